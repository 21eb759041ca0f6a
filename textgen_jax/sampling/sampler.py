"""Rows of tokens drawn a segment at a time.

Between segments the host lets go of finished rows, grows the cache and, for models
that can't look past their trained context, reads the last part of it anew.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from textgen_jax import axes
from textgen_jax.models import base
from textgen_jax.sampling import constraint, decode, reader, speculative
from textgen_jax.sampling import knobs as knobs_lib
from textgen_jax.sampling import rows as rows_lib
from textgen_jax.sampling.params import SamplingParams

# XLA's CPU backend copies a lone row's cache with each token. Past so many slots two lines of one row take less time: of 1,024 slots 598
# microseconds for 1,053, of 128 256 for 230 (4 layers, 128 wide). Its option xla_cpu_copy_insertion_use_region_analysis copies less, and
# draws wrong tokens: with no_repeat_ngram the history is overwritten.
LONE = 320


@dataclasses.dataclass
class _Row:
  params: SamplingParams
  line: list[int]  # prompt and drawn tokens
  negative: list[int] | None  # negative prompt and drawn tokens
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
    draft: a model that guesses ahead; no row may use guidance then.
    uses: what these rows use, and others for which the same is compiled; None: these alone.
    segment: tokens drawn between two looks at the host.

  Attributes:
    rounds: how often a draft guessed for any row.
  """

  def __init__(
    self,
    model: base.LanguageModel,
    params: Any,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[SamplingParams],
    sample_indices: Sequence[int],
    vocab: knobs_lib.Vocab,
    *,
    negatives: Sequence[Sequence[int]] | None = None,
    table: constraint.Table | None = None,
    states: Sequence[int] = (),
    transforms: Sequence[knobs_lib.Transform] = (),
    draft: speculative.Draft | None = None,
    uses: knobs_lib.Uses | None = None,
    segment: int = reader.SEGMENT,
  ):
    self._model, self._params, self._segment, self._vocab, self._draft = model, params, segment, vocab, draft
    self._uses = uses or knobs_lib.Uses.of(settings, vocab, transforms)
    others = negatives if negatives is not None and self._uses.guidance else [None] * len(prompts)
    self._rows = [
      _Row(one, list(prompt), None if other is None else list(other), done=one.max_new_tokens == 0)
      for prompt, other, one in zip(prompts, others, settings, strict=True)
    ]
    self._keys = rows_lib.keys_of(prompts, settings, sample_indices)
    self._table = None if table is None else rows_lib.beside(params, table)  # once: it may be large
    self._states = list(states)
    self._readers: list[reader.Reader] = []  # the model's, and the draft's
    self._state: Any = None  # rows_lib.Rows
    self._batch: list[int] = []  # which row each line of the state belongs to
    self._told = False  # of a row that is done, which the state doesn't know
    self.rounds = 0

  def finish(self, row: int) -> None:
    """Draws no more for this row."""
    self._rows[row].done = self._told = True

  def __iter__(self) -> Iterator[dict[int, 'Segment']]:
    self._batch = [i for i, row in enumerate(self._rows) if not row.done]
    if len(self._batch) == 1 and self._draft is None and self._longest() > LONE:
      self._batch *= 2
    if self._batch:
      self._readers = self._new_readers()
      self._state = self._first_state()
    while active := [i for i, row in enumerate(self._rows) if not row.done]:
      self._let_go(active)
      left = max(self._rows[i].params.max_new_tokens - self._rows[i].drawn for i in active)
      for one in self._readers:
        if one.cache is None or one.room() == 0:
          one.read(left, self._segment)
      yield self._draw(min(self._segment, left))

  def _longest(self) -> int:
    """Slots that attention will see at most."""
    row = self._rows[self._batch[0]]
    return min(len(row.line) + row.params.max_new_tokens, self._model.window or 0)

  def _new_readers(self) -> list[reader.Reader]:
    rows = [self._rows[i] for i in self._batch]
    # The negative prompts' lines stand below.
    lines = [row.line for row in rows] + [row.negative for row in rows if row.negative is not None]
    if self._draft is None:
      return [reader.Reader(self._model, self._params, lines)]
    models = [(self._model, self._params), (self._draft.model, self._draft.params)]
    return [reader.Reader(*one, lines, self._draft.tokens + 1) for one in models]

  def _first_state(self) -> rows_lib.Rows:
    settings, uses = [self._rows[i].params for i in self._batch], self._uses
    states = [self._states[i] for i in self._batch] if uses.constraint else []
    lines = [self._rows[i].line for i in self._batch]
    negatives = [line[-1] for i in self._batch if (line := self._rows[i].negative) is not None]
    return rows_lib.first_rows(self._params, lines, negatives, settings, self._keys[self._batch], uses, self._vocab, states)

  def _draw(self, limit: int) -> dict[int, 'Segment']:
    rows = [self._rows[i] for i in self._batch]
    if self._told:
      self._state = self._state._replace(done_B=rows_lib.beside(self._params, np.array([row.done for row in rows])))
      self._told = False
    trace, sound_B = self._decode(limit)
    trace, drawn_B, done_B, sound_B = jax.device_get((trace, self._state.history.drawn_B, self._state.done_B, sound_B))
    decode.refuse_unsound(sound_B, self._uses)
    news: dict[int, Segment] = {}
    for b, (i, row) in enumerate(zip(self._batch, rows, strict=True)):
      if row.done or i in news:
        continue
      count = int(drawn_B[b]) - row.drawn
      news[i] = Segment.of(trace, b, count)
      for line in (row.line, row.negative):
        if line is not None:
          line += news[i].tokens
      row.drawn, row.done = int(drawn_B[b]), bool(done_B[b])
    return news

  def _decode(self, limit: int) -> tuple[rows_lib.Trace, jax.Array]:
    """One segment on the devices, as far as the models' contexts reach."""
    rooms = [room for one in self._readers if (room := one.room()) is not None]
    # A row that has its share reads a whole round on, to take it back. Where that doesn't fit, what is left of a context is drawn
    # without guesses: then all rows go step by step.
    past = 0 if self._draft is None else self._draft.tokens + 1
    past = past if all(room > past for room in rooms) else 0
    limit = min([limit, *(room - past for room in rooms)])
    for one in self._readers:
      one.reserve(limit)
    ahead, capacities = max(past - 1, 0), [one.capacity for one in self._readers]
    with decode.compile_once(self._model, self._uses, len(self._batch), ahead, *capacities):
      return self._dispatch(limit, ahead)

  def _dispatch(self, most: int, ahead: int) -> tuple[rows_lib.Trace, jax.Array]:
    limit: Any = np.int32(most)
    own = self._readers[0]
    if self._draft is None:
      own.cache, self._state, trace, sound_B = decode.decode(
        self._model, self._params, own.cache, self._state, self._table, limit, uses=self._uses, size=self._segment
      )
      return trace, sound_B
    drafts = self._readers[1]
    (own.cache, drafts.cache), self._state, trace, sound_B, rounds_B = speculative.decode(
      self._model,
      self._params,
      self._draft.model,
      self._draft.params,
      speculative.Caches(own.cache, drafts.cache),
      self._state,
      self._table,
      limit,
      uses=self._uses,
      size=self._segment,
      ahead=ahead,
    )
    self.rounds += int(rounds_B.sum())
    return trace, sound_B

  def _let_go(self, active: list[int]) -> None:
    """Drops finished rows once they are half of the batch: each size is compiled once."""
    size = axes.power_of_two(len(active), low=2)
    if size > len(self._batch) // 2:
      return
    kept = active + [i for i in self._batch if i not in active][: size - len(active)]
    lines = [self._batch.index(i) for i in kept]
    self._state = base.reorder_cache(self._state, np.array(lines, np.int32))
    negatives = [line + len(self._batch) for line in lines] if self._uses.guidance else []
    for one in self._readers:
      one.keep(lines + negatives)
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
  def of(cls, trace: rows_lib.Trace, row: int, count: int) -> 'Segment':
    def part(x: Any) -> list[Any]:
      return [] if x is None else x[row, :count].tolist()

    pairs = zip(part(trace.other), part(trace.other_log_prob), strict=True)
    others = [list(zip(ids, log_probs, strict=True)) for ids, log_probs in pairs]
    return cls(part(trace.token), part(trace.log_prob), part(trace.drawn_log_prob), part(trace.entropy), others)

  def __iadd__(self, other: 'Segment') -> 'Segment':
    for field in dataclasses.fields(self):
      getattr(self, field.name).extend(getattr(other, field.name))
    return self

