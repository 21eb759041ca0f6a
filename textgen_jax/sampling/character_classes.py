"""The character classes of regular expressions as sets of code points; Python's own engine says which characters each has."""

import functools
import re
from typing import Any

import numpy as np

NUM_POINTS = 0x110000
SURROGATES = slice(0xD800, 0xE000)


class CharacterClasses:
  """The character classes of an expression, each a set of code points known by its number; 0 is empty.

  `symbols` has, once `partition` is known, the symbols of each: sets of code points that no class tells apart.
  """

  def __init__(self, alphabet: frozenset[int] | None):
    self._text_P = np.zeros(NUM_POINTS, bool)
    self._text_P[slice(None) if alphabet is None else sorted(alphabet)] = True
    self._text_P[SURROGATES] = False
    self._numbers: dict[Any, int] = {}
    self._edges = [np.zeros(0, np.int64)]  # where each class begins and ends, in turn
    self.symbols: list[list[int]] = []

  def number(self, items: Any, flags: int) -> int:
    """Of the class that the parser's `items` make."""
    key = (tuple(items), flags & (re.ASCII | re.IGNORECASE | re.DOTALL))
    if key not in self._numbers:
      self._numbers[key] = len(self._edges)
      if len(items) == 1 and items[0][0].name == 'LITERAL' and not flags & re.IGNORECASE:
        point = items[0][1]  # most classes: no need to look at every character
        self._edges.append(np.array([point, point + 1] if self._text_P[point] else [], np.int64))
      else:
        found_P = np.concatenate([[False], _members(items, flags) & self._text_P, [False]])
        self._edges.append(np.flatnonzero(found_P[1:] != found_P[:-1]))
    return self._numbers[key]

  def partition(self) -> np.ndarray:
    """The symbol of every code point, int32 [P]; -1 for what is in no class."""
    bounds = np.unique(np.concatenate([[0, NUM_POINTS], *self._edges]))
    inside = np.stack([np.searchsorted(edges, bounds[:-1], 'right') % 2 == 1 for edges in self._edges])
    kinds, kind = np.unique(inside, axis=1, return_inverse=True)
    used = kinds.any(axis=0)
    symbol = np.where(used, np.cumsum(used) - 1, -1).astype(np.int32)
    self.symbols = [symbol[row & used].tolist() for row in kinds]
    return np.repeat(symbol[kind.reshape(-1)], np.diff(bounds))


def _members(items: Any, flags: int) -> np.ndarray:
  """Which code points a class matches, bool [P]."""
  found_P = np.zeros(NUM_POINTS, bool)
  negated = False
  for op, value in items:
    match op.name:
      case 'NEGATE':
        negated = True
      case 'LITERAL':
        found_P[value] = True
      case 'RANGE':
        found_P[value[0] : value[1] + 1] = True
      case 'CATEGORY':
        found_P |= _category(value.name, bool(flags & re.ASCII))
  found_P ^= negated
  if flags & re.IGNORECASE:
    cased = _cased()
    same = re.compile(_source(items), flags & (re.ASCII | re.IGNORECASE)).findall(cased)
    found_P[_points(cased)] = False
    found_P[_points(''.join(same))] = True
  return found_P


def _source(items: Any) -> str:
  """A class as an expression."""
  letters = {'DIGIT': 'd', 'SPACE': 's', 'WORD': 'w'}
  parts = []
  for op, value in items:
    match op.name:
      case 'NEGATE':
        parts.append('^')
      case 'LITERAL':
        parts.append(f'\\U{value:08x}')
      case 'RANGE':
        parts.append(f'\\U{value[0]:08x}-\\U{value[1]:08x}')
      case 'CATEGORY':
        letter = letters[value.name.rpartition('_')[2]]
        parts.append('\\' + (letter.upper() if '_NOT_' in value.name else letter))
  return f'[{"".join(parts)}]'


@functools.cache
def _category(name: str, ascii_only: bool) -> np.ndarray:
  letter = {'DIGIT': r'\d', 'SPACE': r'\s', 'WORD': r'\w'}[name.rpartition('_')[2]]
  found_P = np.zeros(NUM_POINTS, bool)
  found_P[_points(''.join(re.findall(letter, _every_character(), re.ASCII if ascii_only else 0)))] = True
  return found_P ^ ('_NOT_' in name)


@functools.cache
def _cased() -> str:
  """Every character that may match another one where case is ignored."""
  cased = {c for c in _every_character() if c.lower() != c or c.upper() != c}
  return ''.join(sorted(cased | set(''.join(c.lower() + c.upper() for c in cased))))


def _every_character() -> str:
  return ''.join(map(chr, [*range(SURROGATES.start), *range(SURROGATES.stop, NUM_POINTS)]))


def _points(text: str) -> np.ndarray:
  return np.frombuffer(text.encode('utf-32-le'), '<u4')
