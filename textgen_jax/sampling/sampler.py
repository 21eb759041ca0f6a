"""Rows of tokens drawn a segment at a time.

Between segments the host lets go of finished rows, grows the cache and, for models
that can't look past their trained context, reads the last part of it anew.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from textgen_jax import errors
from textgen_jax.models import base
from textgen_jax.sampling import constraint, decode
from textgen_jax.sampling import history as history_lib
from textgen_jax.sampling.params import SamplingParams

SEGMENT = 32  # tokens between two looks at the host; the looks cost 4-5% of the time
MAX_CHUNK = 256  # prompt tokens read in one call


@dataclasses.dataclass
class _Line:
  """What one line of the cache has read: a row's prompt, or its negative prompt, and what was drawn."""

  history: list[int]  # the last one isn't in the cache yet
  start: int = 0  # where in `history` the context that the model sees begins


@dataclasses.dataclass
class _Row:
  params: SamplingParams
  lines: list[_Line]
  drawn: int = 0
  done: bool = False


class Sampler:
  """Iterates over segments: `{row: Segment}` for every row that isn't finished.

  Args:
    model: any model of the contract.
    params: its parameters.
    prompts: ids of each row, at least one.
    settings: of each row.
    sample_indices: tell apart rows of one prompt and seed.
    vocab: the ids that mean something to the sampler.
    negatives: ids of each row's negative prompt, at least one; read where any row's guidance isn't 1.
    table: of the rows' constraints (`constraint.Table`); None where no row has one.
    states: in which of the table's states each row begins.
    transforms: the caller's own, `(logits_BV, history) -> logits_BV`, applied before the temperature.
    segment: tokens drawn between two looks at the host.
  """

  def __init__(
    self,
    model: base.LanguageModel,
    params: Any,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[SamplingParams],
    sample_indices: Sequence[int],
    vocab: decode.Vocab,
    *,
    negatives: Sequence[Sequence[int]] | None = None,
    table: constraint.Table | None = None,
    states: Sequence[int] = (),
    transforms: Sequence[decode.Transform] = (),
    segment: int = SEGMENT,
  ):
    self._model, self._params, self._segment, self._vocab = model, params, segment, vocab
    self._uses = decode.Uses.of(settings, vocab, transforms)
    others = negatives if negatives is not None and self._uses.guidance else [None] * len(prompts)
    self._rows = [
      _Row(one, [_Line(list(ids)) for ids in (prompt, other) if ids is not None], done=one.max_new_tokens == 0)
      for prompt, other, one in zip(prompts, others, settings, strict=True)
    ]
    hashes = [int.from_bytes(hashlib.sha256(np.asarray(p, '<u4').tobytes()).digest()[:4], 'little') for p in prompts]
    seeds = np.array([one.seed for one in settings], np.uint32)
    keys = decode.row_keys(seeds, np.array(hashes, np.uint32), np.array(sample_indices, np.uint32)) if len(prompts) else None
    self._keys = np.asarray(keys)
    self._table = None if table is None else decode.beside(params, table)  # once: it may be large
    self._states = list(states)
    self._cache: Any = None
    self._state: Any = None  # decode.Rows
    self._batch: list[int] = []  # which row each line of the state belongs to

  def finish(self, row: int) -> None:
    """Draws no more for this row."""
    self._rows[row].done = True

  def __iter__(self) -> Iterator[dict[int, 'Segment']]:
    active = [i for i, row in enumerate(self._rows) if not row.done]
    if active:
      self._read(active)
      self._state = self._first_state(active)
    while active := [i for i, row in enumerate(self._rows) if not row.done]:
      self._let_go(active)
      limit = min(self._segment, max(self._rows[i].params.max_new_tokens - self._rows[i].drawn for i in active))
      if self._model.slides:
        limit = min(limit, min(self._room(line) for i in self._batch for line in self._rows[i].lines))
        if limit == 0:
          self._read(self._batch)
          continue
      yield self._draw(limit)

  def _first_state(self, batch: list[int]) -> decode.Rows:
    settings, uses = [self._rows[i].params for i in batch], self._uses
    prompts = [self._rows[i].lines[0].history for i in batch]  # nothing is drawn yet
    history = history_lib.History(drawn_B=jnp.zeros(len(batch), jnp.int32))
    if uses.tokens:
      room = max(len(prompt) + one.max_new_tokens for prompt, one in zip(prompts, settings, strict=True))
      tokens_BL = np.zeros((len(batch), _power_of_two(room, low=64)), np.int32)
      for line, prompt in zip(tokens_BL, prompts, strict=True):
        line[: len(prompt)] = prompt
      history = history._replace(tokens_BL=jnp.asarray(tokens_BL), length_B=jnp.array([len(prompt) for prompt in prompts]))
    if uses.counts:
      in_prompt_BV = jnp.asarray(history_lib.in_prompts(prompts, self._vocab.size))
      history = history._replace(in_prompt_BV=in_prompt_BV, count_BV=jnp.zeros(in_prompt_BV.shape, jnp.int32))
    if uses.constraint:
      history = history._replace(state_B=jnp.array([self._states[i] for i in batch]))
    last = [[line.history[-1] for line in self._rows[i].lines] for i in batch]
    state = decode.Rows(
      token_B=jnp.array([tokens[0] for tokens in last]),
      negative_token_B=jnp.array([tokens[1] for tokens in last]) if uses.guidance else None,
      history=history,
      knobs=decode.Knobs.of(settings, self._keys[batch], uses, self._vocab),
      done_B=jnp.zeros(len(batch), bool),
      log_prob_B=jnp.zeros(len(batch), jnp.float32),
    )
    return decode.beside(self._params, state)

  def _draw(self, limit: int) -> dict[int, 'Segment']:
    rows = [self._rows[i] for i in self._batch]
    self._reserve(limit)
    state = self._state._replace(done_B=decode.beside(self._params, np.array([row.done for row in rows])))
    self._cache, self._state, trace, sound_B = decode.decode(
      self._model, self._params, self._cache, state, self._table, np.int32(limit), uses=self._uses, size=self._segment
    )
    self._used += limit
    trace, drawn_B, done_B, sound_B = jax.device_get((trace, self._state.history.drawn_B, self._state.done_B, sound_B))
    if not sound_B.all():
      raise errors.NoGoodCheckpoint('the model gives a logit that is not a number: its parameters can\'t be good')
    news: dict[int, Segment] = {}
    for b, (i, row) in enumerate(zip(self._batch, rows, strict=True)):
      if row.done:
        continue
      count = int(drawn_B[b]) - row.drawn
      news[i] = Segment.of(trace, b, count)
      for line in row.lines:
        line.history += news[i].tokens
      row.drawn, row.done = int(drawn_B[b]), bool(done_B[b])
    return news

  def _room(self, line: _Line) -> int:
    """Tokens that still fit the trained context of a model that slides."""
    return self._model.context_length - (len(line.history) - 1 - line.start)

  def _read(self, batch: list[int]) -> None:
    """Begins a cache anew with what each row's model may see, all but the last token."""
    self._batch = list(batch)
    lines = [self._rows[i].lines[n] for n in range(2 if self._uses.guidance else 1) for i in batch]
    contexts = []
    for line in lines:
      if self._model.slides and self._room(line) <= 0:
        keep = max(1, self._model.context_length - self._model.context_length // 4)
        line.start = len(line.history) - keep
      contexts.append(line.history[line.start : -1])
    longest = max(map(len, contexts))
    window = self._model.window
    self._chunk = _power_of_two(min(max(longest, 1), MAX_CHUNK), low=16)
    if window is not None:
      self._chunk = min(self._chunk, window)
    chunks = -(-longest // self._chunk)
    self._used = chunks * self._chunk
    more = max(self._rows[i].params.max_new_tokens - self._rows[i].drawn for i in batch)
    self._capacity = self._bounded(_power_of_two(min(max(self._used + self._segment, 256), self._used + more), low=64))
    self._cache = decode.new_cache(self._model, self._params, len(lines), self._capacity)
    # Prompts end together, so that all rows write at one place from then on.
    tokens_BT = np.zeros((len(lines), self._used), np.int32)
    valid_BT = np.zeros((len(lines), self._used), bool)
    for b, context in enumerate(contexts):
      tokens_BT[b, self._used - len(context) :] = context
      valid_BT[b, self._used - len(context) :] = True
    for low in range(0, self._used, self._chunk):
      part = np.s_[:, low : low + self._chunk]
      self._cache = decode.prefill(self._model, self._params, self._cache, tokens_BT[part], valid_BT[part])

  def _bounded(self, capacity: int) -> int:
    """A model with a window needs no more than a ring that holds it while a chunk is written."""
    window = self._model.window
    if window is None or self._model.slides:
      return capacity
    return min(capacity, window + self._chunk - 1)

  def _reserve(self, more: int) -> None:
    """Attention's cost follows the text: the cache doubles when it is full, up to its ring."""
    capacity = self._bounded(max(self._capacity, _power_of_two(self._used + more, low=64)))
    if capacity > self._capacity:
      self._cache = self._model.grow_cache(self._cache, capacity)
      self._capacity = capacity

  def _let_go(self, active: list[int]) -> None:
    """Drops finished rows once they are half of the batch: each size is compiled once."""
    size = _power_of_two(len(active), low=1)
    if size > len(self._batch) // 2:
      return
    kept = active + [i for i in self._batch if i not in active][: size - len(active)]
    lines = np.array([self._batch.index(i) for i in kept], np.int32)
    self._state = base.reorder_cache(self._state, lines)
    negatives = lines + len(self._batch)  # the negative prompts' lines stand below
    self._cache = base.reorder_cache(self._cache, np.concatenate([lines, negatives]) if self._uses.guidance else lines)
    self._batch = kept


@dataclasses.dataclass
class Segment:
  """A row's new tokens, and what is known of each where it was asked for (nats)."""

  tokens: list[int]
  log_probs: list[float]
  drawn_log_probs: list[float]
  entropies: list[float]
  others: list[list[tuple[int, float]]]

  @classmethod
  def of(cls, trace: decode.Trace, row: int, count: int) -> 'Segment':
    def part(x: Any) -> list[Any]:
      return [] if x is None else x[row, :count].tolist()

    pairs = zip(part(trace.other_BTN), part(trace.other_log_prob_BTN), strict=True)
    others = [list(zip(ids, log_probs, strict=True)) for ids, log_probs in pairs]
    return cls(part(trace.token_BT), part(trace.log_prob_BT), part(trace.drawn_log_prob_BT), part(trace.entropy_BT), others)

  def __iadd__(self, other: 'Segment') -> 'Segment':
    for field in dataclasses.fields(self):
      getattr(self, field.name).extend(getattr(other, field.name))
    return self


def _power_of_two(n: int, low: int) -> int:
  size = low
  while size < n:
    size *= 2
  return size
