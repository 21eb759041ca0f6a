"""Texts held to an expression or to a list: an automaton over bytes becomes a table over tokens, which a compiled loop follows."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from textgen_jax import axes, errors
from textgen_jax.sampling import automaton as automaton_lib
from textgen_jax.sampling import history as history_lib
from textgen_jax.sampling import params as params_lib
from textgen_jax.text import base

FREE = 0  # the state of rows that aren't held to anything: any token, and no way out
ENDED = 1  # after the end of a text that matches: that token again, whatever the row
MAX_MOVES = 1 << 24  # of tokens, those alike counted once, from states: 200 MB while the table is built
MAX_ENTRIES = 1 << 25  # of the table, 128 MiB
NEVER = np.iinfo(np.int32).max  # the distance of a row that is there for padding only


class Wanted(NamedTuple):
  """What a text is held to: an expression or choices; with neither it is free."""

  regex: str = ''
  choices: tuple[str, ...] = ()
  banned: tuple[int, ...] = ()  # ids that it isn't spelled with


class Table(NamedTuple):
  """What may be drawn in each state; states of several constraints are numbered through. S and C are powers of two."""

  column_V: Any  # int32; tokens of one column behave alike in every state
  next_SC: Any  # int32, the state after a token of that column; -1: it isn't allowed
  distance_S: Any  # int32, the fewest further tokens until the text matches; 0: it matches now


class Constraints(NamedTuple):
  """The table of a batch's constraints, and where each of them starts."""

  table: Table
  spelling: base.Spelling
  starts: tuple[tuple[int | str, ...], ...]  # [constraint][context]: the first state, or why there is none

  def start(self, index: int, prompt_ids: Sequence[int] | np.ndarray) -> int:
    """The state in which constraint `index` starts after a prompt. Raises UserError where nothing could follow that prompt."""
    start = self.starts[index][self.spelling.context(prompt_ids)]
    if isinstance(start, str):
      raise errors.UserError(start)
    return start

  def fewest_tokens(self, state: int) -> int:
    """How many tokens it takes, at least, from `state` to a text that matches."""
    return int(self.table.distance_S[state])


class _Graph(NamedTuple):
  """One constraint over tokens: only what is reached and can still match. U: tokens that behave alike are one."""

  next_US: np.ndarray  # int32, -1: not allowed
  token_V: np.ndarray  # which distinct token each token is, int32
  distance_S: np.ndarray
  starts: tuple[int | str, ...]  # by context


def wanted(row: params_lib.SamplingParams | Wanted) -> bool:
  """Whether the row is held to anything."""
  return bool(row.regex or row.choices)


def compile_constraints(tokenizer: base.Tokenizer, asked: Sequence[Wanted], vocab_size_padded: int) -> Constraints:
  """The table for rows that are held to what `asked` has.

  A token that writes nothing is allowed only where it changes how the next one is spelled; an unknown one never; the end of the
  text just where the text matches.

  Args:
    tokenizer: whose tokens are drawn.
    asked: of each constraint. Equal ones share states.
    vocab_size_padded: width of the logits.

  Raises:
    UserError: a wrong expression, one that nothing the vocabulary spells matches, or a table that is too large.
  """
  spelling = tokenizer.spelling()
  distinct = list(dict.fromkeys(filter(wanted, asked)))
  letters = _alphabet(spelling)
  graphs = [_graph(one.regex, one.choices, spelling, letters, [*_silenced(tokenizer), *one.banned]) for one in distinct]
  firsts = np.cumsum([2, *(len(graph.distance_S) for graph in graphs)]).tolist()
  table = _table(graphs, firsts, tokenizer, vocab_size_padded)
  starts = {
    one: tuple(start if isinstance(start, str) else first + start for start in graph.starts)
    for one, graph, first in zip(distinct, graphs, firsts, strict=False)
  }
  free = (FREE,) * len(spelling.texts)
  return Constraints(table, spelling, tuple(starts.get(one, free) for one in asked))


def allow(logits_BV: jax.Array, history: history_lib.History, table: Table, remaining_B: jax.Array) -> jax.Array:
  """Keeps the tokens after which the text can still match in time.

  Args:
    logits_BV: unnormalised log-probabilities (nats).
    history: its `state_B` is read.
    table: with `column_V` as wide as the logits.
    remaining_B: how many tokens may still be drawn, this one included.

  Returns:
    logits_BV with the others at -inf.
  """
  assert history.state_B is not None
  next_BC = table.next_SC[history.state_B]
  in_time_BC = table.distance_S[jnp.maximum(next_BC, 0)] < remaining_B[:, None]
  kept_BV = jnp.take((next_BC >= 0) & in_time_BC, table.column_V, axis=1)
  return jnp.where(kept_BV, logits_BV, -jnp.inf)


def advance(history: history_lib.History, table: Table, token_B: jax.Array) -> jax.Array:
  """Each row's state after its token, [B]; after one that isn't allowed, as it was."""
  assert history.state_B is not None
  next_B = table.next_SC[history.state_B, table.column_V[token_B]]
  return jnp.where(next_B >= 0, next_B, history.state_B)


def _alphabet(spelling: base.Spelling) -> frozenset[int] | None:
  """The code points that tokens spell; None where some token isn't whole characters, so that bytes may spell any."""
  try:
    return frozenset(map(ord, ''.join(text.decode() for texts in spelling.texts for text in texts)))
  except UnicodeDecodeError:
    return None


def _silenced(tokenizer: base.Tokenizer) -> list[int]:
  """The ids that no constraint spells with."""
  return [tokenizer.special_ids[name] for name in ('end_of_text', 'unknown') if tokenizer.special_ids.get(name, -1) >= 0]


def _graph(
  regex: str, choices: tuple[str, ...], spelling: base.Spelling, letters: frozenset[int] | None, silenced: list[int]
) -> _Graph:
  automaton = automaton_lib.choices(choices) if choices else automaton_lib.build(regex, letters)
  contexts, name = len(spelling.texts), f'choices={choices!r:.80}' if choices else f'regex={regex!r:.200}'
  key_CV, from_E, key_E, to_E = _moves(automaton, spelling, silenced, name)
  size = len(automaton.next_SN) * contexts
  distance_S = automaton_lib.fewest_steps(to_E, from_E, np.repeat(automaton.accepts_S, contexts))
  reached_CS = np.stack([automaton_lib.fewest_steps(from_E, to_E, np.arange(size) == context) >= 0 for context in range(contexts)])
  kept_S = reached_CS.any(axis=0) & (distance_S >= 0)
  problems = [_problem(name, automaton, choices, reached_S, distance_S[context]) for context, reached_S in enumerate(reached_CS)]
  if all(problems):
    raise errors.UserError(problems[0])
  number_S = np.where(kept_S, np.cumsum(kept_S) - 1, -1).astype(np.int32)
  starts = tuple(problem + ', after this prompt' if problem else int(number_S[i]) for i, problem in enumerate(problems))
  kept_E = kept_S[from_E] & kept_S[to_E]
  moves = number_S[from_E[kept_E]], key_E[kept_E], number_S[to_E[kept_E]]
  next_US, token_V = _columns(key_CV, *moves, int(kept_S.sum()), name)
  return _Graph(next_US, token_V, distance_S[kept_S], starts)


def _problem(name: str, automaton: automaton_lib.Automaton, choices: tuple[str, ...], reached_S: np.ndarray, distance: int) -> str:
  """Why nothing can be spelled from a start; '' where it can."""
  contexts = len(reached_S) // len(automaton.next_SN)
  for choice in choices:
    end = automaton_lib.walk(automaton, choice.encode()) * contexts
    if not reached_S[end : end + contexts].any():
      return f"choices: this vocabulary can't spell {choice!r:.60}"
  return '' if distance >= 0 else f'{name} matches no text that this vocabulary can spell'


def _moves(
  automaton: automaton_lib.Automaton, spelling: base.Spelling, silenced: list[int], name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Edges between states (of the automaton * contexts + context): each token's key in each context, [C, V], -1 for one that is never
  allowed; and from where, by what key, to where. Tokens of one key write alike and leave the same context."""
  contexts = len(spelling.texts)
  same, byte_class = np.unique(automaton.next_SN, axis=1, return_inverse=True)
  classes = byte_class.reshape(-1).astype(np.uint8).tobytes()  # bytes that the automaton doesn't tell apart become one
  next_BS = np.ascontiguousarray(same.T)
  key_CV: np.ndarray = np.full(spelling.next_CV.shape, -1, np.int32)
  none = np.zeros(0, np.int32)
  found, keys, total = [(none, none, none)], 0, 0
  for context, texts in enumerate(spelling.texts):
    numbers: dict[tuple[bytes, int], int] = {}
    for token, text in enumerate(texts):
      following = int(spelling.next_CV[context, token])
      if token not in silenced and (text or following != context):
        key_CV[context, token] = numbers.setdefault((text.translate(classes), following), keys + len(numbers))
    keys += len(numbers)
    order = sorted(numbers)
    for (_, following), number, (from_S, to_S) in zip(
      order, map(numbers.__getitem__, order), _follow(next_BS, [data for data, _ in order]), strict=True
    ):
      total += len(from_S)
      if total > MAX_MOVES:
        raise errors.UserError(
          f'{name} is too large for this vocabulary: its {len(automaton.next_SN):,} states and {len(spelling.texts[0]):,} tokens'
          f' allow more than {MAX_MOVES:,} moves'
        )
      if len(from_S):
        found.append((from_S * contexts + context, np.full_like(from_S, number), to_S * contexts + following))
  from_E, key_E, to_E = (np.concatenate(parts) for parts in zip(*found, strict=True))
  return key_CV, from_E, key_E, to_E


def _follow(next_BS: np.ndarray, ordered: Sequence[bytes]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """From which states each string of byte classes leads on, and where to. Sorted, those that share a beginning share its work."""
  every = np.arange(next_BS.shape[1], dtype=np.int32)
  path, walked = [(every, every)], b''
  for data in ordered:
    shared = next((i for i, (a, b) in enumerate(zip(data, walked, strict=False)) if a != b), min(len(data), len(walked)))
    del path[shared + 1 :]
    for byte in data[shared:]:
      from_S, at_S = path[-1]
      to_S = next_BS[byte][at_S]
      alive_S = to_S >= 0
      path.append((from_S[alive_S], to_S[alive_S]))
    walked = data
    yield path[-1]


def _columns(
  key_CV: np.ndarray, from_E: np.ndarray, key_E: np.ndarray, to_E: np.ndarray, num_states: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
  """The next state by distinct token and state, [U, S], and the distinct token of each token, [V]."""
  used = np.unique(key_E)
  place = np.full(key_CV.max(initial=-1) + 2, len(used), np.int32)  # its last is that of key -1; what no edge has behaves like it
  place[used] = np.arange(len(used))
  kinds_UC, kind_V = np.unique(place[key_CV].T, axis=0, return_inverse=True)
  _check_size(num_states, len(kinds_UC), name)
  next_US = np.full((len(kinds_UC), num_states), -1, np.int32)
  order = np.argsort(key_E, kind='stable')
  bounds = np.searchsorted(key_E[order], np.append(used, used[-1] + 1 if used.size else 0))
  for row_S, kind_C in zip(next_US, kinds_UC, strict=True):
    for key in kind_C[kind_C < len(used)]:
      edges = order[bounds[key] : bounds[key + 1]]
      row_S[from_E[edges]] = to_E[edges]
  numbers: dict[bytes, int] = {}
  merged_U = np.array([numbers.setdefault(row_S.tobytes(), len(numbers)) for row_S in next_US], np.int32)
  return next_US[np.unique(merged_U, return_index=True)[1]], merged_U[kind_V.reshape(-1)]


def _table(graphs: Sequence[_Graph], firsts: Sequence[int], tokenizer: base.Tokenizer, vocab_size_padded: int) -> Table:
  """All constraints in one table; where tokens differ in any of them they have columns of their own."""
  kind_V = np.zeros(vocab_size_padded, np.int32)  # padding
  kind_V[: tokenizer.vocab_size] = 1
  end = tokenizer.special_ids['end_of_text']
  kind_V[end] = 2
  token_GV = np.full((len(graphs) + 1, vocab_size_padded), -1, np.int32)
  token_GV[0] = kind_V
  for token_V, graph in zip(token_GV[1:], graphs, strict=True):
    token_V[: tokenizer.vocab_size] = graph.token_V
  kinds_CG, column_V = np.unique(token_GV.T, axis=0, return_inverse=True)
  num_states, num_columns = axes.power_of_two(firsts[-1], low=8), axes.power_of_two(len(kinds_CG), low=8)
  _check_size(num_states, num_columns, 'regex, choices: the table of all rows')
  next_SC = np.full((num_states, num_columns), -1, np.int32)
  distance_S = np.full(num_states, NEVER, np.int32)
  column_V = column_V.reshape(-1).astype(np.int32)
  next_SC[FREE, : len(kinds_CG)] = np.where(kinds_CG[:, 0] > 0, FREE, -1)
  next_SC[ENDED, column_V[end]] = ENDED
  distance_S[:2] = 0
  for place, (graph, first) in enumerate(zip(graphs, firsts, strict=False), 1):
    states = slice(first, first + len(graph.distance_S))
    writes_C = np.flatnonzero(kinds_CG[:, 0] > 0)
    next_SW = graph.next_US[kinds_CG[writes_C, place]].T
    next_SC[states, writes_C] = np.where(next_SW >= 0, next_SW + first, -1)
    next_SC[states, column_V[end]] = np.where(graph.distance_S == 0, ENDED, -1)
    distance_S[states] = graph.distance_S
  return Table(column_V, next_SC, distance_S)


def _check_size(num_states: int, num_columns: int, name: str) -> None:
  if num_states * num_columns > MAX_ENTRIES:
    raise errors.UserError(
      f'{name} takes {num_states:,} states times {num_columns:,} kinds of tokens, {num_states * num_columns * 4 >> 20:,} MiB:'
      f' at most {MAX_ENTRIES * 4 >> 20} MiB'
    )
