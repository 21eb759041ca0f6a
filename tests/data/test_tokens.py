import numpy as np

from textgen_jax.data import tokens

# 9 ends a text. Three documents, of 4, 1 and 3 tokens besides; the ends that close them count.
IDS = np.array([9, 1, 2, 3, 4, 9, 5, 9, 6, 7, 8, 9], np.uint16)
RECORDS = [(0, 5, 20, 10, 4, 2, 6), (5, 2, 3, 2, 1, 1, 2), (7, 4, 8, 8, 3, 0, 0)]
SPLIT = tokens.Split(IDS, np.array(RECORDS, tokens.DOCUMENT), (tokens.Range(0, 8, 0.75), tokens.Range(7, 12, 0.25)))
# Replies: tokens 2, 3 and 4 of the first, its end, all of the last.
REPLIES = np.isin(np.arange(12), [2, 3, 4, 5, 8, 9, 10, 11])
SCORED = [(0, 4, 16, 8, 3, 2, 6), (5, 0, 0, 0, 0, 0, 0), (7, 4, 8, 8, 3, 0, 0)]
TALK = tokens.Split(IDS, np.array(SCORED, tokens.DOCUMENT), (tokens.Range(0, 12, 1.0),), REPLIES)


def test_a_prefix_by_hand():
  for length, expected in {
    2: [(0, 1, 4, 2, 1, 0, 1)],  # 1 of 5 tokens; 0.8 words, 0.4 unknowns, 1.2 of their bytes
    4: [(0, 3, 12, 6, 2, 1, 4)],  # 3 of 5
    5: [(0, 4, 16, 8, 3, 2, 5)],
    6: RECORDS[:1],  # whole, with the end that closes it; the next has nothing to be predicted
    7: [RECORDS[0], (5, 1, 2, 1, 0, 0, 1)],  # halves are rounded to even
    8: RECORDS[:2],
    10: [*RECORDS[:2], (7, 2, 4, 4, 2, 0, 0)],
    11: [*RECORDS[:2], (7, 3, 6, 6, 2, 0, 0)],
  }.items():
    found = tokens.prefix(SPLIT, length)
    assert found.tokens.tolist() == IDS[:length].tolist()
    assert found.documents.tolist() == expected, length
    assert found.documents['tokens'].sum() == length - 1
    assert found.ranges == ((0, length, 1.0),)
    assert found.is_reply is None


def test_a_prefix_of_replies_by_hand():
  for length, expected in {
    2: [(0, 0, 0, 0, 0, 0, 0)],
    4: [(0, 2, 8, 4, 2, 1, 3)],
    6: SCORED[:1],
    7: SCORED[:2],
    9: [*SCORED[:2], (7, 1, 2, 2, 1, 0, 0)],
  }.items():
    found = tokens.prefix(TALK, length)
    assert found.documents.tolist() == expected, length
    assert found.is_reply.tolist() == REPLIES[:length].tolist()
    assert found.documents['tokens'].sum() == found.is_reply.sum()


def test_a_prefix_that_is_all_is_the_split_itself():
  for split in (SPLIT, TALK):
    assert tokens.prefix(split, 12) is tokens.prefix(split, 99) is split


def test_a_prefix_changes_nothing_of_the_split():
  before = SPLIT.documents.copy()
  found = tokens.prefix(SPLIT, 4)
  assert (SPLIT.documents == before).all()
  assert len(tokens.prefix(found, 3).tokens) == 3
  assert len(SPLIT.tokens) == 12
