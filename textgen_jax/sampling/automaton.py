"""Regular expressions, and lists of texts, as automata that read UTF-8 a byte at a time.

`re.fullmatch` is the definition: Python's own parser reads the expression, and Python's own engine says which characters a class has.
"""

import importlib
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from textgen_jax import errors
from textgen_jax.sampling import character_classes, expressions

MAX_STATES = 1 << 14  # each takes 1 KiB; \w alone has 310
MAX_CHOICE_BYTES = 1 << 16  # states of a list of texts; each takes 1 KiB
_MINIMISING_ROUNDS = 50  # what needs more stays as it is, larger and as right
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
    terms = expressions.Terms(character_classes.CharacterClasses(alphabet))
    start = expressions.translate(tree, tree.state.flags, terms, True, True)
    symbol_P = terms.classes.partition()
    return _to_bytes(*_minimise(*_determinise(terms, start)), symbol_P)
  except (re.error, OverflowError) as error:
    raise errors.UserError(f'regex={pattern!r:.200} is not a regular expression: {error}') from error
  except RecursionError as error:
    raise errors.UserError(f'regex={pattern!r:.200} is nested too deeply') from error
  except expressions.TooLargeError as error:
    raise errors.UserError(
      f'regex={pattern!r:.200} needs more than {MAX_STATES:,} states, or too many steps to find them:'
      ' make its repeats shorter, or \\w, \\d, \\s and (?i) ASCII by a leading (?a)'
    ) from error
  except expressions.UnsupportedError as error:
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


def _determinise(terms: expressions.Terms, start: int) -> tuple[np.ndarray, np.ndarray]:
  """The state after each symbol, int32 [S, K], and which states accept."""
  numbers = {frozenset([start]): 0}
  states = [frozenset([start])]
  rows: list[dict[int, int]] = []
  for state in states:  # grows
    found: dict[int, frozenset[int]] = {}
    for term in state:
      moves = terms.moves(term)
      expressions.merge(found, moves)
      terms.spend(len(moves) + len(state))
    largest = {following: terms.largest(following) for following in set(found.values())}
    found = {symbol: largest[following] for symbol, following in found.items()}
    for following in set(found.values()):
      if numbers.setdefault(following, len(states)) == len(states):
        states.append(following)
        if len(states) > MAX_STATES:
          raise expressions.TooLargeError
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
          raise expressions.TooLargeError
    return found
