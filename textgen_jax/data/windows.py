"""Batches of tokens: each one a pure function of (data, seed, step), so that a resume needs no iterator's state."""

from typing import NamedTuple

import numpy as np

from textgen_jax import errors

ALL_ROWS = slice(None)


class Batch(NamedTuple):
  """Rows of text; a pytree. `tokens_BT[b, t + 1] == targets_BT[b, t]`."""

  tokens_BT: np.ndarray          # int32
  targets_BT: np.ndarray         # int32
  weights_BT: np.ndarray         # float32; 1 where the target counts, 0 where the row is padded
  starts_BT: np.ndarray | None   # bool; True where a carried state must be forgotten. None: rows are independent


class RandomWindows:
  """Windows at places drawn uniformly, with replacement, from all of the text's.

  Args:
    tokens: [N], of any integer type, in memory or mapped.
    seed: non-negative; with the step it decides the batch.
    batch_size: B.
    length: T; N must be larger.
  """

  def __init__(self, tokens: np.ndarray, seed: int, batch_size: int, length: int):
    _check_sizes(batch_size, length)
    if len(tokens) < length + 1:
      raise errors.UserError(
          f'the split has {len(tokens)} tokens: training.sequence_length={length} (training.batch_size={batch_size}) needs at least'
          f' {length + 1}, the last being only a target'
      )
    self._tokens, self._seed, self._batch_size, self._length = np.asarray(tokens), seed, batch_size, length

  def batch(self, step: int, rows: slice = ALL_ROWS) -> Batch:
    """The batch of `step` (0, 1, ...), or just `rows` of it, for a host that holds only those."""
    offsets_B = _generator(self._seed, step).integers(0, len(self._tokens) - self._length, self._batch_size)
    return _gather(self._tokens, offsets_B[rows], self._length, None)


class ContiguousStreams:
  """Parallel streams that each go on from batch to batch, for models that carry their state along.

  Row b reads the b-th of B equal parts of the text. When no whole window is left an epoch ends; the next one starts at an
  offset drawn anew from [0, T), so that windows don't cut the text at the same places in each epoch.

  Args:
    tokens: [N], of any integer type, in memory or mapped.
    seed: non-negative; with the epoch it decides the offset.
    batch_size: B.
    length: T; N must be at least B * (2 * T + 1).
  """

  def __init__(self, tokens: np.ndarray, seed: int, batch_size: int, length: int):
    _check_sizes(batch_size, length)
    needed = batch_size * (2 * length + 1)
    if len(tokens) < needed:
      raise errors.UserError(
          f'the split has {len(tokens)} tokens: {batch_size} contiguous streams (training.batch_size={batch_size},'
          f' training.sequence_length={length}) need at least {needed}'
      )
    self._tokens, self._seed, self._batch_size, self._length = np.asarray(tokens), seed, batch_size, length
    self._stream_tokens = len(tokens) // batch_size
    # Every epoch has as many steps as the largest offset, T - 1, leaves room for: that makes the epoch a function of the step.
    self.steps_per_epoch = (self._stream_tokens - length) // length

  def batch(self, step: int, rows: slice = ALL_ROWS) -> Batch:
    """The batch of `step` (0, 1, ...), or just `rows` of it, for a host that holds only those."""
    epoch, epoch_step = divmod(step, self.steps_per_epoch)
    offset = _generator(self._seed, epoch).integers(self._length) + epoch_step * self._length
    offsets_B = (np.arange(self._batch_size) * self._stream_tokens + offset)[rows]
    starts_BT = np.zeros((len(offsets_B), self._length), bool)
    starts_BT[:, 0] = epoch_step == 0
    return _gather(self._tokens, offsets_B, self._length, starts_BT)


class EvaluationRows:
  """The text cut into rows that depend on nothing but it: every token except the first is a target exactly once.

  Row r predicts tokens r * T + 1 ... (r + 1) * T; the last row is padded.

  Args:
    tokens: [N], of any integer type, in memory or mapped; at least 2.
    row_length: T.
  """

  def __init__(self, tokens: np.ndarray, row_length: int):
    _check_sizes(1, row_length)
    if len(tokens) < 2:
      raise errors.UserError(f'the split has {len(tokens)} tokens: evaluation needs at least 2')
    self._tokens, self._row_length = np.asarray(tokens), row_length
    self.num_targets = len(tokens) - 1
    self.num_rows = -(-self.num_targets // row_length)

  def batch(self, first: int, stop: int) -> Batch:
    """Rows first ... stop - 1; those past the last one weigh 0, so that any batch size may step over the text."""
    length = self._row_length
    block = self._tokens[first * length : stop * length + 1].astype(np.int32)
    padded = np.zeros((stop - first) * length + 1, np.int32)
    padded[: len(block)] = block
    weights = np.arange((stop - first) * length) < len(block) - 1
    return Batch(
        tokens_BT=padded[:-1].reshape(-1, length),
        targets_BT=padded[1:].reshape(-1, length),
        weights_BT=weights.astype(np.float32).reshape(-1, length),
        starts_BT=None,
    )


def _generator(seed: int, count: int) -> np.random.Generator:
  # Counter-based: the n-th generator costs as much as the first.
  return np.random.Generator(np.random.Philox(key=np.array([seed, count], np.uint64)))


def _gather(tokens: np.ndarray, offsets_B: np.ndarray, length: int, starts_BT: np.ndarray | None) -> Batch:
  # Rows of a view of all windows, T + 1 wide: copied whole, 9 times faster than an index for each token.
  windows_BT = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[offsets_B].astype(np.int32)
  return Batch(windows_BT[:, :-1], windows_BT[:, 1:], np.ones((len(offsets_B), length), np.float32), starts_BT)


def _check_sizes(batch_size: int, length: int) -> None:
  if batch_size < 1 or length < 1:
    raise errors.UserError(f'training.batch_size={batch_size} and training.sequence_length={length} must be at least 1')
