"""A split's loss, over rows that the data alone fixes."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from textgen_jax.data import windows
from textgen_jax.models import base
from textgen_jax.training import losses


class Score(NamedTuple):
  """What a pass over a split adds up to."""

  nll_sum: float  # nats
  tokens: int  # predicted
  bytes: int  # of text that those tokens stand for

  @property
  def loss_nats(self) -> float:
    return self.nll_sum / self.tokens

  @property
  def bits_per_byte(self) -> float:
    return self.nll_sum / math.log(2) / self.bytes

  @property
  def perplexity(self) -> float:
    return math.exp(min(self.loss_nats, 700.0))  # float64 ends at exp(709)


# A row of an evaluation with carried state, about: long enough to forget that it began with nothing.
CARRIED_ROW_TOKENS = 8192


def row_chunks(carried: bool, length: int) -> int:
  """How many calls of `length` tokens score one row: one, unless the model was trained to carry its state."""
  return -(-CARRIED_ROW_TOKENS // length) if carried else 1


@functools.partial(jax.jit, static_argnames='model')
def nll_sums(model: base.LanguageModel, params: Any, cache: Any, batch: windows.Batch) -> tuple[jax.Array, Any]:
  """Each row's summed loss (nats), [B], and the cache after the batch."""
  hidden_BTD, cache = model.apply({'params': params}, batch.tokens_BT, cache=cache, starts_BT=batch.starts_BT)
  logits_BTV = model.apply({'params': params}, hidden_BTD, method='unembed')
  return (losses.nll(logits_BTV, batch.targets_BT) * batch.weights_BT).sum(axis=1), cache


def evaluate(
  model: base.LanguageModel,
  params: Any,
  tokens: np.ndarray,
  byte_lengths: np.ndarray,
  *,
  length: int,
  batch_size: int,
  put: Callable[[Any], Any] = jax.device_put,
  row_chunks: int = 1,
  divisor: int = 1,
) -> Score:
  """Scores every token but the first, each once, without dropout.

  The text is cut into rows of `length * row_chunks` tokens, each scored from nothing; a
  model that carries its state reads a row in chunks, one that doesn't takes `row_chunks=1`.
  Neither rows nor their order depend on `batch_size`, and each row is summed apart.

  Args:
    model: the model.
    params: its parameters.
    tokens: ids, [N] with N at least 2.
    byte_lengths: UTF-8 bytes by id, [V].
    length: tokens in one call.
    batch_size: rows in one call.
    put: brings arrays that lead with B to the devices.
    row_chunks: calls that one row takes.
    divisor: what `batch_size` is a multiple of, and must stay (the devices that rows are split over).
  """
  rows = windows.EvaluationRows(tokens, length * row_chunks)
  batch_size = min(batch_size, -(-rows.num_rows // divisor) * divisor)  # a short text has fewer rows
  sums, byte_count, token_count = [], 0, 0
  for low in range(0, rows.num_rows, batch_size):
    batch = rows.batch(low, low + batch_size)
    counted = batch.weights_BT > 0
    byte_count += int(byte_lengths[batch.targets_BT[counted]].sum())
    token_count += int(counted.sum())
    cache = put(model.init_cache(batch_size, 0)) if row_chunks > 1 else None
    for chunk in range(row_chunks):
      part = jax.tree.map(lambda x, c=chunk: np.ascontiguousarray(x[:, c * length : (c + 1) * length]), batch)
      if not part.weights_BT.any():
        break
      nll_B, cache = nll_sums(model, params, cache, put(part))
      sums.append(nll_B)
      if len(sums) > 1:
        # Two calls in flight keep the device busy; a long queue of collectives can lock up several CPU devices.
        jax.block_until_ready(sums[-2])
  # Added in float64.
  return Score(float(np.concatenate(jax.device_get(sums)).astype(np.float64).sum()), token_count, byte_count)
