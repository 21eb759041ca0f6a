"""Conversations: turns of a name, a colon, what is said and a blank line. What is answered is told from the answers."""

import re
from collections.abc import Iterator, Sequence

import yaml

from textgen_jax.data import documents

MAX_TURNS = 4         # of a conversation of speeches
MAX_CHARACTERS = 600  # of such a conversation
# Here the lines after the first are answers to it, one as good as the other; in other files speakers take turns.
_ALTERNATIVES = ('computers', 'emotion')
_STRAIGHT = str.maketrans({'\u2018': "'", '\u2019': "'", '\u201c': '"', '\u201d': '"', '\xa0': ' ', '\u2026': '...', '\u2013': '-'})


def conversations(speeches: Sequence[str]) -> Iterator[tuple[int, list[documents.Part]]]:
  """Runs of 2 to MAX_TURNS speeches of a scene, each run with its first speech's index; what is too long to fit in one is left out."""
  first = 0
  while first < len(speeches):
    end = first
    while end < min(first + MAX_TURNS, len(speeches)) and sum(map(len, speeches[first : end + 1])) <= MAX_CHARACTERS:
      end += 1
    if end - first >= 2:
      yield first, [documents.Part(speech, index > first) for index, speech in enumerate(speeches[first:end], start=first)]
      first = end
    else:
      first += 1


def chatterbot(name: str, data: bytes) -> Iterator[tuple[str, list[documents.Part]]]:
  """The conversations of the chatterbot-corpus file `name`.yml, each with its first line as a key that spelling doesn't change."""
  tree = yaml.load(data, yaml.BaseLoader)  # texts alone, so that the answers No and 1963 stay what was written
  for lines in tree['conversations']:
    if not isinstance(lines, list):  # one is a text
      continue
    for said in [[lines[0], other] for other in lines[1:]] if name in _ALTERNATIVES else [lines]:
      texts = [_tidy(text) if isinstance(text, str) else '' for text in said]
      if len(texts) >= 2 and all(texts):
        key = ' '.join(re.findall(r'\w+', texts[0].lower()))
        yield key, [documents.Part(f'{("USER", "BOT")[i % 2]}:\n{text}\n\n', i % 2 == 1) for i, text in enumerate(texts)]


def _tidy(text: str) -> str:
  """Typewriter's marks, no spaces at line ends, and no blank lines: one would end the turn."""
  return '\n'.join(filter(None, (line.rstrip() for line in text.translate(_STRAIGHT).strip().split('\n'))))
