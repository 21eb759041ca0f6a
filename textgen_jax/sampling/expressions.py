"""Regular expressions, as Python's own parser reads them, as terms that tell what may follow a character."""

import importlib
import math
import re
from typing import Any

from textgen_jax.sampling import character_classes

MAX_STEPS = 2_000_000  # of building, a second or so
_TYPE_FLAGS = re.ASCII | re.LOCALE | re.UNICODE
_REFUSED = {
  'ASSERT': 'lookaround', 'ASSERT_NOT': 'negative lookaround', 'GROUPREF': 'a backreference', 'GROUPREF_EXISTS': 'a conditional group',
  'POSSESSIVE_REPEAT': 'a possessive repeat', 'ATOMIC_GROUP': 'an atomic group',
}  # fmt: skip
_PLACES = {
  'AT_BEGINNING': (True, '^'), 'AT_BEGINNING_STRING': (True, r'\A'), 'AT_END': (False, '$'), 'AT_END_STRING': (False, r'\Z'),
}  # fmt: skip
_EMPTY = 0  # the term that only the empty text matches


class TooLargeError(Exception):
  """More states or steps than the bounds."""


class UnsupportedError(Exception):
  """Names what no automaton has."""


class Terms:
  """Expressions as lists of parts; each list is held once and known by its number.

  A part is ('class', number), ('any of', terms) or ('repeat', term, low, high), where high=None is without bound. Repeats stay
  counters: `a{9}` becomes `a{8}` when it has read one, so that nothing is written out before it is needed.
  """

  def __init__(self, classes: character_classes.CharacterClasses):
    self.classes = classes
    self._heads: list[Any] = [None]
    self._tails = [_EMPTY]
    self.nullable = [True]  # whether each term matches the empty text
    self._numbers: dict[tuple, int] = {}
    # Terms of one family differ in the bounds of their first counted repeat only, which stand beside it.
    self._families: dict[tuple, int] = {}
    self._counted: list[tuple[int, int, float]] = [(-1, 0, 0)]
    self._joined: dict[tuple[int, int], int] = {}
    self._moves: dict[int, dict[int, frozenset[int]]] = {_EMPTY: {}}
    self._steps = 0

  def spend(self, steps: int) -> None:
    self._steps += steps
    if self._steps > MAX_STEPS:
      raise TooLargeError

  def add(self, head: Any, tail: int = _EMPTY) -> int:
    number = self._numbers.setdefault((head, tail), len(self._heads))
    if number == len(self._heads):
      self.spend(5)  # a term takes the memory of so many
      self._heads.append(head)
      self._tails.append(tail)
      self.nullable.append(self.nullable[tail] and self._head_nullable(head))
      self._counted.append(self._count(head, tail))
    return number

  def _count(self, head: Any, tail: int) -> tuple[int, int, float]:
    family, low, high = self._counted[tail]
    key: tuple = (head, family)
    if head[0] == 'repeat' and head[3] != 1 and head[2:] != (0, None):
      key, low, high = ('repeat', head[1], tail), head[2], math.inf if head[3] is None else head[3]
    return self._families.setdefault(key, len(self._families)), low, high

  def largest(self, terms: frozenset[int]) -> frozenset[int]:
    """The set without terms whose texts another one has all, as `a{0,9}` has those of `a{2,5}`."""
    if len(terms) == 1:
      return terms
    most: dict[int, float] = {}
    kept = []
    for term in sorted(terms, key=lambda t: (self._counted[t][1], -self._counted[t][2])):
      family, _, high = self._counted[term]
      if high > most.get(family, -1):
        kept.append(term)
        most[family] = high
    return frozenset(kept)

  def repeat(self, term: int, low: int, high: int | None) -> int:
    if term == _EMPTY or high == 0:
      return _EMPTY
    return self.add(('repeat', term, 0 if self.nullable[term] else low, high))

  def join(self, first: int, rest: int) -> int:
    """The term of `first`, then `rest`."""
    if rest == _EMPTY:
      return first
    path = []
    while first != _EMPTY and (first, rest) not in self._joined:
      path.append(first)
      first = self._tails[first]
    joined = rest if first == _EMPTY else self._joined[first, rest]
    for term in reversed(path):
      joined = self._joined[term, rest] = self.add(self._heads[term], joined)
    return joined

  def moves(self, term: int) -> dict[int, frozenset[int]]:
    """What may follow each symbol that `term` can begin with: any of the terms of a set.

    Source: Antimirov 1996, "Partial derivatives of regular expressions and finite automaton constructions".
    """
    found = self._moves.get(term)
    if found is None:
      found, at = {}, term
      while at != _EMPTY:
        head, at = self._heads[at], self._tails[at]
        merge(found, self._then(self._head_moves(head), at))
        self.spend(sum(map(len, found.values())))
        if not self._head_nullable(head):
          break
      self._moves[term] = found
    return found

  def _then(self, moves: dict[int, frozenset[int]], rest: int) -> dict[int, frozenset[int]]:
    distinct = set(moves.values())
    after = {terms: frozenset(self.join(term, rest) for term in terms) for terms in distinct}
    return {symbol: after[terms] for symbol, terms in moves.items()}

  def _head_moves(self, head: Any) -> dict[int, frozenset[int]]:
    match head:
      case ('class', number):
        return dict.fromkeys(self.classes.symbols[number], frozenset([_EMPTY]))
      case ('any of', terms):
        found: dict[int, frozenset[int]] = {}
        for term in terms:
          merge(found, self.moves(term))
        return found
      case (_, term, low, high):
        return self._then(self.moves(term), self.repeat(term, max(low - 1, 0), None if high is None else high - 1))
    raise AssertionError(head)

  def _head_nullable(self, head: Any) -> bool:
    match head:
      case ('class', _):
        return False
      case ('any of', terms):
        return any(self.nullable[term] for term in terms)
      case (_, term, low, _):
        return low == 0 or self.nullable[term]
    raise AssertionError(head)


def merge(into: dict[int, frozenset[int]], more: dict[int, frozenset[int]]) -> None:
  """Adds to `into` what `more` has: terms by symbol."""
  for symbol, terms in more.items():
    into[symbol] = into[symbol] | terms if symbol in into else terms


def translate(parsed: Any, flags: int, terms: Terms, begins: bool, ends: bool) -> int:
  """The term of what the parser gave. `begins`, `ends`: nothing of the text stands before it, after it."""
  items = list(parsed)
  places = [op.name == 'AT' for op, _ in items]
  term = _EMPTY
  for i in reversed(range(len(items))):
    first, last = begins and all(places[:i]), ends and all(places[i + 1 :])
    term = terms.join(_translate_item(items[i][0], items[i][1], flags, terms, first, last), term)
  return term


def _translate_item(op: Any, value: Any, flags: int, terms: Terms, begins: bool, ends: bool) -> int:
  match op.name:
    case 'LITERAL':
      return terms.add(('class', terms.classes.number([(op, value)], flags)))
    case 'IN':
      return terms.add(('class', terms.classes.number(value, flags)))
    case 'NOT_LITERAL' | 'ANY':
      return terms.add(('class', terms.classes.number(_as_class(op, value, flags), flags)))
    case 'BRANCH':
      return terms.add(('any of', tuple(translate(branch, flags, terms, begins, ends) for branch in value[1])))
    case 'SUBPATTERN':
      _, added, removed, body = value
      kept = flags & ~_TYPE_FLAGS if added & _TYPE_FLAGS else flags
      return translate(body, (kept | added) & ~removed, terms, begins, ends)
    case 'MAX_REPEAT' | 'MIN_REPEAT':
      low, high, body = value
      once = high == 1
      high = None if getattr(high, 'name', '') == 'MAXREPEAT' else high
      return terms.repeat(translate(body, flags, terms, begins and once, ends and once), low, high)
    case 'AT':
      _check_place(value.name, begins, ends)
      return _EMPTY
  raise UnsupportedError(_REFUSED.get(op.name, f'a part of kind {op.name.lower()}'))


def _as_class(op: Any, value: Any, flags: int) -> list:
  constants = importlib.import_module('re._constants')
  if op.name == 'NOT_LITERAL':
    return [(constants.NEGATE, None), (constants.LITERAL, value)]
  return [(constants.NEGATE, None), *([] if flags & re.DOTALL else [(constants.LITERAL, 10)])]


def _check_place(name: str, begins: bool, ends: bool) -> None:
  if name not in _PLACES:
    raise UnsupportedError(r'\B' if 'NON' in name else r'\b')
  at_beginning, sign = _PLACES[name]
  if not (begins if at_beginning else ends):
    raise UnsupportedError(f'{sign} elsewhere than at its {"beginning" if at_beginning else "end"}')
