"""A split as tokens, and what its documents measure as text."""

from typing import NamedTuple

import numpy as np

MEASURES = (
  'bytes',  # UTF-8
  'characters',
  'words',  # set apart by white space
  'unknowns',  # pieces that have no id
  'unknown_bytes',  # UTF-8 bytes of those pieces
)

# One record a document. `start` is the place of its first token, which is `end_of_text`; `tokens` are those to be predicted: all
# after it, and the `end_of_text` that closes the document. The measures are of the text that those tokens stand for.
DOCUMENT = np.dtype([(name, '<i8') for name in ('start', 'tokens', *MEASURES)])


class Range(NamedTuple):
  """A corpus within a split of several."""

  start: int
  stop: int
  weight: float  # its share of what is drawn; all add up to 1


class Split(NamedTuple):
  """Tokens of documents, each after `end_of_text`, with one more at the end."""

  tokens: np.ndarray  # [N], of an integer type
  documents: np.ndarray  # DOCUMENT, [number of documents]
  ranges: tuple[Range, ...]
  is_reply: np.ndarray | None = None  # bool [N], where replies alone are learned and scored


def prefix(split: Split, length: int) -> Split:
  """The first `length` tokens; a document that they end within is measured in proportion."""
  if length >= len(split.tokens):
    return split
  records = split.documents[split.documents['start'] < length - 1].copy()
  last = records[-1]
  place = slice(int(last['start']) + 1, length)
  counted = place.stop - place.start if split.is_reply is None else int(split.is_reply[place].sum())
  share = counted / max(int(last['tokens']), 1)
  for name in MEASURES:
    last[name] = round(int(last[name]) * share)
  last['tokens'] = counted
  is_reply = None if split.is_reply is None else split.is_reply[:length]
  return Split(split.tokens[:length], records, (Range(0, length, 1.0),), is_reply)
