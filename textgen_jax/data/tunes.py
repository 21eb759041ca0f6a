"""Tunes in ABC notation, one form for all: five headers, then music."""

import re
from collections.abc import Iterator
from typing import NamedTuple

_FIELD = re.compile(r'([A-Za-z]):(?![|:])(.*)')  # `G:|` is music
_KINDS = frozenset('air clog double fling highland hornpipe jig march polka quick reel slip slipjig step strathspey waltz a an the'.split())


class Tune(NamedTuple):
  key: str    # of its title: the same for most versions of one tune
  notes: str  # the letters of its music: the same for one version under two titles
  text: str


def tunes(text: str) -> Iterator[Tune]:
  """The tunes of a file that have music: X:1, T: (the first), R: (if any), M:, L:, K:, and the lines of music.

  Comments and other fields go. Changes of key, metre and note length inside the music stay.
  """
  for tune in re.split(r'^(?=X:)', text, flags=re.MULTILINE)[1:]:  # a heading may stand before the first
    fields: dict[str, str] = {}
    music: list[str] = []
    for line in (re.sub(r'(?<!\\)%.*', '', line).strip() for line in tune.split('\n')):
      field = _FIELD.fullmatch(line)
      if field and 'K' not in fields:
        fields.setdefault(field[1], field[2].strip())
      elif field and field[1] in 'KLM':
        music.append(f'{field[1]}:{field[2].strip()}')
      elif line and not field and 'K' in fields:  # what stands above the key is a field gone wrong
        music.append(line)
    if {'T', 'M', 'K'} <= set(fields) and any(line for line in music if not _FIELD.fullmatch(line)):
      fields |= {'X': '1', 'L': fields.get('L') or _note_length(fields['M'])}
      header = [f'{name}:{fields[name]}' for name in 'XTRMLK' if fields.get(name)]
      yield Tune(title_key(fields['T']), re.sub('[^A-Ga-g]', '', ''.join(music)), '\n'.join([*header, *music, '']))


def title_key(title: str) -> str:
  """A title's words without its kind of dance, articles, signs and a last s: 'Fox Chase, The', 'THE FOX\'S CHASE -- REEL.' are one."""
  words = [re.sub('(?<=..)s$', '', word) for word in re.findall(r'\w+', title.lower().replace("'", ''))]
  return ' '.join([word for word in words if word not in _KINDS] or words)


def _note_length(meter: str) -> str:
  """What stands for a missing L: in ABC: sixteenths in metres shorter than 3/4, else eighths."""
  fraction = re.fullmatch(r'(\d+)/(\d+)', meter)
  return '1/16' if fraction and int(fraction[1]) / int(fraction[2]) < 0.75 else '1/8'
