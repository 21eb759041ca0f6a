import pytest
import yaml

from textgen_jax.data import dialogue, documents


def speech(characters):
  return 'A:\n' + 'x' * (characters - 5) + '\n\n'


@pytest.mark.parametrize(
  ('lengths', 'runs'),
  [
    ([10, 20, 30, 40, 50, 60], [(0, 4), (4, 2)]),
    ([10, 20, 30, 40, 50], [(0, 4)]),  # the fifth answers nothing
    ([300, 300, 10, 10], [(0, 2), (2, 2)]),
    ([300, 301, 10], [(1, 2)]),
    ([601, 10, 590, 10, 601, 10], [(1, 2)]),
    ([10], []),
    ([], []),
  ],
)
def test_conversations_are_runs_of_speeches(lengths, runs):
  speeches = [speech(length) for length in lengths]
  assert [(first, len(parts)) for first, parts in dialogue.conversations(speeches)] == runs
  for first, parts in dialogue.conversations(speeches):
    assert [part.text for part in parts] == speeches[first : first + len(parts)]
    assert [part.is_reply for part in parts] == [False] + [True] * (len(parts) - 1)


YAML = """
categories: [test]
conversations:
- - Are you \u2018sure\u2019?
  - No
- - are you, sure
  - "Here's how:\\n\\n```\\n  x = 1  \\n```\\n"
  - Thanks
- - When?
  - 1963
- not a conversation
- - alone
- - ''
  - nothing
- - it: is a table
  - so
- []
""".encode()


def test_chatterbot_reads_as_turns():
  read = list(dialogue.chatterbot('history', YAML))
  assert [key for key, _ in read] == ['are you sure', 'are you sure', 'when']
  part = documents.Part
  assert [parts for _, parts in read] == [
    [part("USER:\nAre you 'sure'?\n\n", False), part('BOT:\nNo\n\n', True)],
    [
      part('USER:\nare you, sure\n\n', False),
      part("BOT:\nHere's how:\n```\n  x = 1\n```\n\n", True),
      part('USER:\nThanks\n\n', False),
    ],
    [part('USER:\nWhen?\n\n', False), part('BOT:\n1963\n\n', True)],
  ]


def test_alternatives_each_answer_the_first_line():
  data = yaml.safe_dump({'conversations': [['Are you sad?', 'Never.', 'Why?']]}).encode()
  texts = [''.join(part.text for part in parts) for _, parts in dialogue.chatterbot('emotion', data)]
  assert texts == ['USER:\nAre you sad?\n\nBOT:\nNever.\n\n', 'USER:\nAre you sad?\n\nBOT:\nWhy?\n\n']
  assert len(list(dialogue.chatterbot('health', data))) == 1


def test_no_object_is_built():
  with pytest.raises(yaml.YAMLError):
    list(dialogue.chatterbot('x', b'conversations: [["a", "b"]'))
  read = list(dialogue.chatterbot('x', b'conversations: [[!!python/name:os.system a, b]]'))
  assert [key for key, _ in read] == ['a']  # a text, like any other
