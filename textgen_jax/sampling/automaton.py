"""Regular expressions, and lists of texts, as automata that read UTF-8 a byte at a time.

`re.fullmatch` is the definition: Python's own parser reads the expression, and Python's own engine says which characters a class has.
"""

import functools
import importlib
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from textgen_jax import errors

MAX_STATES = 1 << 14  # each takes 1 KiB; \w alone has 310
MAX_CHOICE_BYTES = 1 << 16  # states of a list of texts; each takes 1 KiB
MAX_STEPS = 2_000_000  # of building, a second or so
_MINIMISING_ROUNDS = 50  # what needs more stays as it is, larger and as right
_NUM_POINTS = 0x110000
_SURROGATES = slice(0xD800, 0xE000)
_TYPE_FLAGS = re.ASCII | re.LOCALE | re.UNICODE
_REFUSED = {
  'ASSERT': 'lookaround', 'ASSERT_NOT': 'negative lookaround', 'GROUPREF': 'a backreference', 'GROUPREF_EXISTS': 'a conditional group',
  'POSSESSIVE_REPEAT': 'a possessive repeat', 'ATOMIC_GROUP': 'an atomic group',
}  # fmt: skip
_PLACES = {
  'AT_BEGINNING': (True, '^'), 'AT_BEGINNING_STRING': (True, r'\A'), 'AT_END': (False, '$'), 'AT_END_STRING': (False, r'\Z'),
}  # fmt: skip
_EMPTY = 0  # the term that only the empty text matches


class Automaton(NamedTuple):
  """Deterministic; state 0 is where a text starts. From every other state some text leads to a match."""

  next_SN: np.ndarray  # the state after each of the 256 bytes, int32; -1: none
  accepts_S: np.ndarray  # bool


def build(pattern: str, alphabet: frozenset[int] | None = None) -> Automaton:
  """The automaton of the texts that match in full.

  Args:
    pattern: a regular expression, as `re` has them.
    alphabet: code points that a text may have; None: all. Fewer make classes such as `\\w` much smaller.

  Raises:
    UserError: not an expression, not a regular one, or one that takes too many states.
  """
  try:
    re.compile(pattern)  # what is wrong beyond syntax
    tree = importlib.import_module('re._parser').parse(pattern)
    terms = _Terms(_Classes(alphabet))
    start = _translate(tree, tree.state.flags, terms, True, True)
    symbol_P = terms.classes.partition()
    return _to_bytes(*_minimise(*_determinise(terms, start)), symbol_P)
  except (re.error, OverflowError) as error:
    raise errors.UserError(f'regex={pattern!r:.200} is not a regular expression: {error}') from error
  except RecursionError as error:
    raise errors.UserError(f'regex={pattern!r:.200} is nested too deeply') from error
  except _TooLargeError as error:
    raise errors.UserError(
      f'regex={pattern!r:.200} needs more than {MAX_STATES:,} states, or too many steps to find them:'
      ' make its repeats shorter, or \\w, \\d, \\s and (?i) ASCII by a leading (?a)'
    ) from error
  except _UnsupportedError as error:
    raise errors.UserError(f"regex={pattern!r:.200} has {error}, which a text's drawing can't follow") from error


def choices(texts: Iterable[str]) -> Automaton:
  """The automaton of just these texts. Raises UserError where they are no text, or too long together."""
  children: list[dict[int, int]] = [{}]
  accepting = []
  for text in texts:
    state = 0
    try:
      data = text.encode()
    except UnicodeEncodeError as error:
      raise errors.UserError(f'choices: {text!r:.60} has {text[error.start]!r}, half a surrogate pair, which is not text') from error
    for byte in data:
      if byte not in children[state]:
        if len(children) == MAX_CHOICE_BYTES:
          raise errors.UserError(f'choices: the texts take more than {MAX_CHOICE_BYTES:,} bytes, beginnings that they share counted once')
        children[state][byte] = len(children)
        children.append({})
      state = children[state][byte]
    accepting.append(state)
  next_SN = np.full((len(children), 256), -1, np.int32)
  for row_N, following in zip(next_SN, children, strict=True):
    row_N[list(following)] = list(following.values())
  accepts_S = np.zeros(len(children), bool)
  accepts_S[accepting] = True
  return Automaton(next_SN, accepts_S)


def walk(automaton: Automaton, data: bytes) -> int:
  """The state after `data`; -1: none."""
  state = 0
  for byte in data:
    if state >= 0:
      state = int(automaton.next_SN[state, byte])
  return state


def fewest_steps(from_E: np.ndarray, to_E: np.ndarray, root_S: np.ndarray) -> np.ndarray:
  """How many of the edges each state is away from the nearest root (`root_S`, bool), int32 [S]; -1: no way leads there."""
  order = np.argsort(from_E, kind='stable')
  to_E = to_E[order]
  first_S = np.searchsorted(from_E[order], np.arange(len(root_S) + 1))
  distance_S = np.full(len(root_S), -1, np.int32)
  frontier, steps = np.flatnonzero(root_S), 0
  while frontier.size:
    distance_S[frontier] = steps
    counts = first_S[frontier + 1] - first_S[frontier]
    edges = np.repeat(first_S[frontier] - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
    reached = np.unique(to_E[edges])
    frontier, steps = reached[distance_S[reached] < 0], steps + 1
  return distance_S


class _TooLargeError(Exception):
  """More states or steps than the bounds."""


class _UnsupportedError(Exception):
  """Names what no automaton has."""


class _Classes:
  """The character classes of an expression, each a set of code points known by its number; 0 is empty.

  `symbols` has, once `partition` is known, the symbols of each: sets of code points that no class tells apart.
  """

  def __init__(self, alphabet: frozenset[int] | None):
    self._text_P = np.zeros(_NUM_POINTS, bool)
    self._text_P[slice(None) if alphabet is None else sorted(alphabet)] = True
    self._text_P[_SURROGATES] = False
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
    bounds = np.unique(np.concatenate([[0, _NUM_POINTS], *self._edges]))
    inside = np.stack([np.searchsorted(edges, bounds[:-1], 'right') % 2 == 1 for edges in self._edges])
    kinds, kind = np.unique(inside, axis=1, return_inverse=True)
    used = kinds.any(axis=0)
    symbol = np.where(used, np.cumsum(used) - 1, -1).astype(np.int32)
    self.symbols = [symbol[row & used].tolist() for row in kinds]
    return np.repeat(symbol[kind.reshape(-1)], np.diff(bounds))


def _members(items: Any, flags: int) -> np.ndarray:
  """Which code points a class matches, bool [P]."""
  found_P = np.zeros(_NUM_POINTS, bool)
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
  found_P = np.zeros(_NUM_POINTS, bool)
  found_P[_points(''.join(re.findall(letter, _every_character(), re.ASCII if ascii_only else 0)))] = True
  return found_P ^ ('_NOT_' in name)


@functools.cache
def _cased() -> str:
  """Every character that may match another one where case is ignored."""
  cased = {c for c in _every_character() if c.lower() != c or c.upper() != c}
  return ''.join(sorted(cased | set(''.join(c.lower() + c.upper() for c in cased))))


def _every_character() -> str:
  return ''.join(map(chr, [*range(_SURROGATES.start), *range(_SURROGATES.stop, _NUM_POINTS)]))


def _points(text: str) -> np.ndarray:
  return np.frombuffer(text.encode('utf-32-le'), '<u4')


class _Terms:
  """Expressions as lists of parts; each list is held once and known by its number.

  A part is ('class', number), ('any of', terms) or ('repeat', term, low, high), where high=None is without bound. Repeats stay
  counters: `a{9}` becomes `a{8}` when it has read one, so that nothing is written out before it is needed.
  """

  def __init__(self, classes: _Classes):
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
      raise _TooLargeError

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
        _merge(found, self._then(self._head_moves(head), at))
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
          _merge(found, self.moves(term))
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


def _merge(into: dict[int, frozenset[int]], more: dict[int, frozenset[int]]) -> None:
  for symbol, terms in more.items():
    into[symbol] = into[symbol] | terms if symbol in into else terms


def _translate(parsed: Any, flags: int, terms: _Terms, begins: bool, ends: bool) -> int:
  """The term of what the parser gave. `begins`, `ends`: nothing of the text stands before it, after it."""
  items = list(parsed)
  places = [op.name == 'AT' for op, _ in items]
  term = _EMPTY
  for i in reversed(range(len(items))):
    first, last = begins and all(places[:i]), ends and all(places[i + 1 :])
    term = terms.join(_translate_item(items[i][0], items[i][1], flags, terms, first, last), term)
  return term


def _translate_item(op: Any, value: Any, flags: int, terms: _Terms, begins: bool, ends: bool) -> int:
  match op.name:
    case 'LITERAL':
      return terms.add(('class', terms.classes.number([(op, value)], flags)))
    case 'IN':
      return terms.add(('class', terms.classes.number(value, flags)))
    case 'NOT_LITERAL' | 'ANY':
      return terms.add(('class', terms.classes.number(_as_class(op, value, flags), flags)))
    case 'BRANCH':
      return terms.add(('any of', tuple(_translate(branch, flags, terms, begins, ends) for branch in value[1])))
    case 'SUBPATTERN':
      _, added, removed, body = value
      kept = flags & ~_TYPE_FLAGS if added & _TYPE_FLAGS else flags
      return _translate(body, (kept | added) & ~removed, terms, begins, ends)
    case 'MAX_REPEAT' | 'MIN_REPEAT':
      low, high, body = value
      once = high == 1
      high = None if getattr(high, 'name', '') == 'MAXREPEAT' else high
      return terms.repeat(_translate(body, flags, terms, begins and once, ends and once), low, high)
    case 'AT':
      _check_place(value.name, begins, ends)
      return _EMPTY
  raise _UnsupportedError(_REFUSED.get(op.name, f'a part of kind {op.name.lower()}'))


def _as_class(op: Any, value: Any, flags: int) -> list:
  constants = importlib.import_module('re._constants')
  if op.name == 'NOT_LITERAL':
    return [(constants.NEGATE, None), (constants.LITERAL, value)]
  return [(constants.NEGATE, None), *([] if flags & re.DOTALL else [(constants.LITERAL, 10)])]


def _check_place(name: str, begins: bool, ends: bool) -> None:
  if name not in _PLACES:
    raise _UnsupportedError(r'\B' if 'NON' in name else r'\b')
  at_beginning, sign = _PLACES[name]
  if not (begins if at_beginning else ends):
    raise _UnsupportedError(f'{sign} elsewhere than at its {"beginning" if at_beginning else "end"}')


def _determinise(terms: _Terms, start: int) -> tuple[np.ndarray, np.ndarray]:
  """The state after each symbol, int32 [S, K], and which states accept."""
  numbers = {frozenset([start]): 0}
  states = [frozenset([start])]
  rows: list[dict[int, int]] = []
  for state in states:  # grows
    found: dict[int, frozenset[int]] = {}
    for term in state:
      moves = terms.moves(term)
      _merge(found, moves)
      terms.spend(len(moves) + len(state))
    largest = {following: terms.largest(following) for following in set(found.values())}
    found = {symbol: largest[following] for symbol, following in found.items()}
    for following in set(found.values()):
      if numbers.setdefault(following, len(states)) == len(states):
        states.append(following)
        if len(states) > MAX_STATES:
          raise _TooLargeError
    rows.append({symbol: numbers[following] for symbol, following in found.items()})
  num_symbols = 1 + max((max(symbols) for symbols in terms.classes.symbols if symbols), default=0)
  next_SK = np.full((len(states), num_symbols), -1, np.int32)
  for row_K, row in zip(next_SK, rows, strict=True):
    row_K[list(row)] = list(row.values())
  return next_SK, np.array([any(terms.nullable[term] for term in state) for state in states])


def _minimise(next_SK: np.ndarray, accepts_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The same without states that lead nowhere, and with those that behave alike as one (Moore's refinement)."""
  from_E, symbol_E = np.nonzero(next_SK >= 0)
  distance_S = fewest_steps(next_SK[from_E, symbol_E], from_E, accepts_S)
  next_SK = np.where((next_SK >= 0) & (distance_S[next_SK] >= 0), next_SK, -1)
  # States at different distances from a match differ; to begin there makes most refinements short.
  block_S, count, settled = distance_S, len(np.unique(distance_S)), False
  for _ in range(_MINIMISING_ROUNDS):
    following_SK = np.where(next_SK >= 0, block_S[next_SK], -1)
    blocks, block_S = np.unique(np.concatenate([block_S[:, None], following_SK], axis=1), axis=0, return_inverse=True)
    block_S = block_S.reshape(-1)
    settled, count = len(blocks) == count, len(blocks)
    if settled:
      break
  if not settled:
    block_S = np.arange(len(next_SK))
  alive_S = distance_S >= 0
  alive_S[0] = True  # even where nothing matches
  # Numbered by their first state: the start's comes first.
  _, first = np.unique(np.where(alive_S, block_S, -1), return_index=True)
  kept = np.sort(first[alive_S[first]])
  number_S = np.full(len(next_SK), -1, np.int32)
  number_S[block_S[kept]] = np.arange(len(kept))
  next_SK = next_SK[kept]
  return np.where(next_SK >= 0, number_S[block_S[next_SK]], -1), accepts_S[kept]


def _to_bytes(next_SK: np.ndarray, accepts_S: np.ndarray, symbol_P: np.ndarray) -> Automaton:
  """Characters as their bytes; states within a character come after the others.

  A block is 64 characters that share all bytes but the last, then 64 such blocks, and 64 of those. What their characters' symbols
  are doesn't depend on the state, so that equal blocks are found once.
  """
  two = _blocks_of(symbol_P, spelled_shorter=0x80)
  three = _blocks_of(two[1], spelled_shorter=0x800 // 64)
  four = _blocks_of(three[1], spelled_shorter=0x10000 // 4096)
  rows, states = [], _Rows(len(next_SK))
  for next_K in next_SK:
    after_K = np.append(next_K, -1)  # -1, no symbol, is the last
    in_two = states.numbers(after_K[two[0]])
    in_three = states.numbers(np.append(in_two, -1)[three[0]])
    in_four = states.numbers(np.append(in_three, -1)[four[0]])
    row_N = np.full(256, -1, np.int32)
    row_N[:0x80] = after_K[symbol_P[:0x80]]
    row_N[0xC2:0xE0] = in_two[two[1][2:32]]
    row_N[0xE0:0xF0] = in_three[three[1][:16]]
    row_N[0xF0 : 0xF0 + len(four[1])] = in_four[four[1]]
    rows.append(row_N)
  next_SN = np.full((len(rows) + len(states.rows), 256), -1, np.int32)
  next_SN[: len(rows)] = rows
  if states.rows:
    next_SN[len(rows) :, 0x80:0xC0] = states.rows
  return Automaton(next_SN, np.concatenate([accepts_S, np.zeros(len(states.rows), bool)]))


def _blocks_of(parts: np.ndarray, spelled_shorter: int) -> tuple[np.ndarray, np.ndarray]:
  """Distinct rows of 64 parts, and which each place has. The first `spelled_shorter` parts have no spelling of this length."""
  padded = np.full(-(-len(parts) // 64) * 64, -1, np.int32)
  padded[spelled_shorter : len(parts)] = parts[spelled_shorter:]
  rows, numbers = padded.reshape(-1, 64), dict[bytes, int]()
  number = np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in rows], np.int32)  # 8 times faster than np.unique
  return rows[np.unique(number, return_index=True)[1]], number


class _Rows:
  """States within a character, each held once and known by its number, from `first` on."""

  def __init__(self, first: int):
    self._first = first
    self._numbers: dict[bytes, int] = {}
    self.rows: list[np.ndarray] = []

  def numbers(self, rows: np.ndarray) -> np.ndarray:
    """Of each row of 64 next states; -1 for a row that leads nowhere."""
    found = np.full(len(rows), -1, np.int32)
    for i in np.flatnonzero((rows >= 0).any(axis=1)):
      row = rows[i].astype(np.int32)
      found[i] = self._numbers.setdefault(row.tobytes(), self._first + len(self.rows))
      if found[i] == self._first + len(self.rows):
        self.rows.append(row)
        if found[i] >= MAX_STATES:
          raise _TooLargeError
    return found
