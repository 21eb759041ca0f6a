"""Rows of tokens drawn a segment at a time.

Between segments the host lets go of finished rows, grows the cache and, for models
that can't look past their trained context, reads the last part of it anew.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from textgen_jax.models import base
from textgen_jax.sampling import decode
from textgen_jax.sampling.params import SamplingParams

SEGMENT = 32  # tokens between two looks at the host; the looks cost 4-5% of the time
MAX_CHUNK = 256  # prompt tokens read in one call


@dataclasses.dataclass
class _Row:
  params: SamplingParams
  history: list[int]  # prompt and what was drawn; the last one isn't in the cache yet
  drawn: int = 0
  start: int = 0  # where in `history` the context that the model sees begins
  done: bool = False


class Sampler:
  """Iterates over segments: `{row: new ids}` for every row that isn't finished.

  Args:
    model: any model of the contract.
    params: its parameters.
    prompts: ids of each row, at least one.
    settings: of each row.
    sample_indices: tell apart rows of one prompt and seed.
    end_of_text: the id that ends a row whose `stop_at_end` is on.
    unknown: the id that a row draws only where it may (`allow_unknown`).
    segment: tokens drawn between two looks at the host.
  """

  def __init__(
    self,
    model: base.LanguageModel,
    params: Any,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[SamplingParams],
    sample_indices: Sequence[int],
    end_of_text: int | None = None,
    unknown: int | None = None,
    segment: int = SEGMENT,
  ):
    self._model, self._params, self._segment = model, params, segment
    self._end_of_text, self._unknown = end_of_text, unknown
    self._rows = [_Row(one, list(prompt), done=one.max_new_tokens == 0) for prompt, one in zip(prompts, settings, strict=True)]
    hashes = [int.from_bytes(hashlib.sha256(np.asarray(p, '<u4').tobytes()).digest()[:4], 'little') for p in prompts]
    seeds = np.array([one.seed for one in settings], np.uint32)
    keys = decode.row_keys(seeds, np.array(hashes, np.uint32), np.array(sample_indices, np.uint32)) if len(prompts) else None
    self._keys = np.asarray(keys)
    self._cache: Any = None
    self._batch: list[int] = []  # which row each line of the cache belongs to

  def finish(self, row: int) -> None:
    """Draws no more for this row."""
    self._rows[row].done = True

  def __iter__(self) -> Iterator[dict[int, list[int]]]:
    active = [i for i, row in enumerate(self._rows) if not row.done]
    if active:
      self._read(active)
    while active := [i for i, row in enumerate(self._rows) if not row.done]:
      self._let_go(active)
      limit = min(self._segment, max(self._rows[i].params.max_new_tokens - self._rows[i].drawn for i in active))
      if self._model.slides:
        limit = min(limit, min(self._room(self._rows[i]) for i in self._batch))
        if limit == 0:
          self._read(self._batch)
          continue
      yield self._draw(limit)

  def _draw(self, limit: int) -> dict[int, list[int]]:
    rows = [self._rows[i] for i in self._batch]
    self._reserve(limit)
    settings = [row.params for row in rows]
    self._cache, drawn_BT = decode.decode(
      self._model,
      self._params,
      self._cache,
      np.array([row.history[-1] for row in rows], np.int32),
      np.array([row.drawn for row in rows], np.int32),
      decode.Knobs.of(settings, self._keys[self._batch]),
      np.int32(limit),
      uses=decode.Uses.of(settings, self._unknown),
      size=self._segment,
    )
    self._used += limit
    news: dict[int, list[int]] = {}
    for i, row, line in zip(self._batch, rows, np.asarray(drawn_BT)[:, :limit].tolist(), strict=True):
      row.history += line
      if row.done:
        continue
      line = line[: row.params.max_new_tokens - row.drawn]
      ends = row.params.stop_at_end and self._end_of_text in line
      news[i] = line[: line.index(self._end_of_text) + 1] if ends else line
      row.drawn += limit
      row.done = ends or row.drawn >= row.params.max_new_tokens
    return news

  def _room(self, row: _Row) -> int:
    """Tokens that still fit the trained context of a model that slides."""
    return self._model.context_length - (len(row.history) - 1 - row.start)

  def _read(self, batch: list[int]) -> None:
    """Begins a cache anew with what each row's model may see, all but the last token."""
    self._batch = list(batch)
    contexts = []
    for i in batch:
      row = self._rows[i]
      if self._model.slides and self._room(row) <= 0:
        keep = max(1, self._model.context_length - self._model.context_length // 4)
        row.start = len(row.history) - keep
      contexts.append(row.history[row.start : -1])
    longest = max(map(len, contexts))
    window = self._model.window
    self._chunk = _power_of_two(min(max(longest, 1), MAX_CHUNK), low=16)
    if window is not None:
      self._chunk = min(self._chunk, window)
    chunks = -(-longest // self._chunk)
    self._used = chunks * self._chunk
    more = max(self._rows[i].params.max_new_tokens - self._rows[i].drawn for i in batch)
    self._capacity = self._bounded(_power_of_two(min(max(self._used + self._segment, 256), self._used + more), low=64))
    self._cache = decode.new_cache(self._model, self._params, len(batch), self._capacity)
    # Prompts end together, so that all rows write at one place from then on.
    tokens_BT = np.zeros((len(batch), self._used), np.int32)
    valid_BT = np.zeros((len(batch), self._used), bool)
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
    lines = [self._batch.index(i) for i in kept]
    self._cache = base.reorder_cache(self._cache, np.array(lines, np.int32))
    self._batch = kept


def _power_of_two(n: int, low: int) -> int:
  size = low
  while size < n:
    size *= 2
  return size
