"""Batches of tokens: each one a pure function of (data, seed, step), so that a resume needs no iterator's state."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from textgen_jax import errors
from textgen_jax.data import tokens

ALL_ROWS = slice(None)
KINDS = ('random', 'shuffled', 'contiguous')


class Batch(NamedTuple):
  """Rows of text; a pytree. `tokens_BT[b, t + 1] == targets_BT[b, t]`."""

  tokens_BT: np.ndarray          # int32
  targets_BT: np.ndarray         # int32
  weights_BT: np.ndarray         # float32; 1 where the target counts, 0 where it doesn't: padding, or what isn't a reply
  starts_BT: np.ndarray | None   # bool; True where what came before must be forgotten. None: nowhere, and rows are independent


class RandomWindows:
  """Windows at places drawn uniformly, with replacement, from all of the text's; the corpus first, by its weight, where there are several.

  Args:
    split: the text.
    seed: non-negative; with the step it decides the batch.
    batch_size: B.
    length: T; every corpus must have more tokens.
    end_of_text: this id's every place is a start, so that no document sees another; None: windows know no documents.
  """

  def __init__(self, split: tokens.Split, seed: int, batch_size: int, length: int, end_of_text: int | None = None):
    _check_sizes(batch_size, length)
    for part in split.ranges:
      if part.stop - part.start < length + 1:
        raise errors.UserError(
            f'the split has {part.stop - part.start} tokens: training.sequence_length={length} (training.batch_size={batch_size}) needs'
            f' at least {length + 1}, the last being only a target'
        )
    self._split, self._seed, self._batch_size, self._length, self._end_of_text = split, seed, batch_size, length, end_of_text

  def batch(self, step: int, rows: slice = ALL_ROWS) -> Batch:
    """The batch of `step` (0, 1, ...), or just `rows` of it, for a host that holds only those."""
    generator = _generator(self._seed, step)
    starts, stops, weights = map(np.array, zip(*self._split.ranges, strict=True))
    corpus_B = generator.choice(len(weights), self._batch_size, p=weights) if len(weights) > 1 else np.zeros(self._batch_size, np.int64)
    offsets_B = starts[corpus_B] + generator.integers(0, (stops - starts - self._length)[corpus_B])
    return _gather(self._split, offsets_B[rows], self._length, None, self._end_of_text)


class ShuffledWindows:
  """Windows side by side, each read once an epoch, in an order drawn anew for each; it begins at an offset drawn from [0, T).

  Rows are shared out among the corpora by their weights, at least one each; each corpus has epochs of its own.

  Args:
    split: the text.
    seed: non-negative; with the corpus and the epoch it decides offset and order.
    batch_size: B; at least as many as corpora.
    length: T; every corpus must have at least 2 * T tokens.
    end_of_text: as `RandomWindows` has it.
  """

  def __init__(self, split: tokens.Split, seed: int, batch_size: int, length: int, end_of_text: int | None = None):
    _check_sizes(batch_size, length)
    self._rows = share_out(batch_size, [part.weight for part in split.ranges])
    # As many windows an epoch as the largest offset, T - 1, leaves room for: that makes the epoch a function of the step.
    self.windows_per_epoch = [(part.stop - part.start - length) // length for part in split.ranges]
    if not min(self.windows_per_epoch):
      part = split.ranges[self.windows_per_epoch.index(0)]
      raise errors.UserError(
        f'the split has {part.stop - part.start} tokens: shuffled windows (training.sequence_length={length}) need at least {2 * length}'
      )
    self._split, self._seed, self._length, self._end_of_text = split, seed, length, end_of_text
    # Epochs are begun in the middle of a batch, and batches ahead are made while a step before is run again.
    self._places = functools.lru_cache(maxsize=2 * len(split.ranges))(self._draw_places)

  def batch(self, step: int, rows: slice = ALL_ROWS) -> Batch:
    """The batch of `step` (0, 1, ...), or just `rows` of it, for a host that holds only those."""
    offsets = []
    for corpus, (part, count) in enumerate(zip(self._split.ranges, self._rows, strict=True)):
      turns = [divmod(n, self.windows_per_epoch[corpus]) for n in range(step * count, (step + 1) * count)]
      offsets += [part.start + self._places(corpus, epoch)[turn] for epoch, turn in turns]
    return _gather(self._split, np.array(offsets)[rows], self._length, None, self._end_of_text)

  def _draw_places(self, corpus: int, epoch: int) -> np.ndarray:
    generator = _generator(self._seed, corpus << 48 | epoch)
    offset = generator.integers(self._length)
    return offset + self._length * generator.permutation(self.windows_per_epoch[corpus])


class ContiguousStreams:
  """Parallel streams that each go on from batch to batch, for models that carry their state along.

  Rows are shared out among the corpora by their weights, at least one each. Row b of a corpus's B reads the b-th of B equal parts
  of it. When no whole window is left an epoch ends; the next one starts at an offset drawn anew from [0, T), so that windows don't
  cut the text at the same places in each epoch.

  Args:
    split: the text.
    seed: non-negative; with the epoch it decides the offset.
    batch_size: B; at least as many as corpora.
    length: T; a corpus of B rows must have at least B * (2 * T + 1) tokens.
    end_of_text: this id's every place is a start, so that no document sees another; None: the state is carried from one to the next.
    reset_probability: that a row begins a batch anew, drawn for each row and step. A prompt and a row that is scored begin with an
      empty state; a model that had seen none but in its first batch scored whole rows of 8,192 bytes at 15 nats.
  """

  def __init__(
      self, split: tokens.Split, seed: int, batch_size: int, length: int, end_of_text: int | None = None, reset_probability: float = 0.0
  ):
    _check_sizes(batch_size, length)
    self._reset_probability = reset_probability
    self._split, self._seed, self._length, self._end_of_text = split, seed, length, end_of_text
    self._rows = share_out(batch_size, [part.weight for part in split.ranges])
    for part, rows in zip(split.ranges, self._rows, strict=True):
      needed = rows * (2 * length + 1)
      if part.stop - part.start < needed:
        raise errors.UserError(
            f'the split has {part.stop - part.start} tokens: {rows} contiguous streams (training.batch_size={batch_size},'
            f' training.sequence_length={length}) need at least {needed}'
        )
    self._stream_tokens = [(part.stop - part.start) // rows for part, rows in zip(split.ranges, self._rows, strict=True)]
    # Every epoch has as many steps as the largest offset, T - 1, leaves room for: that makes the epoch a function of the step.
    self.steps_per_epoch = [(size - length) // length for size in self._stream_tokens]

  def batch(self, step: int, rows: slice = ALL_ROWS) -> Batch:
    """The batch of `step` (0, 1, ...), or just `rows` of it, for a host that holds only those."""
    offsets, begins = [], []
    for i, (part, count) in enumerate(zip(self._split.ranges, self._rows, strict=True)):
      epoch, epoch_step = divmod(step, self.steps_per_epoch[i])
      offset = _generator(self._seed, epoch).integers(self._length, size=i + 1)[i] + epoch_step * self._length
      offsets.append(part.start + np.arange(count) * self._stream_tokens[i] + offset)
      begins.append(np.full(count, epoch_step == 0))
    offsets_B, begins_B = np.concatenate(offsets), np.concatenate(begins)
    # Steps count from the other end than epochs, which have generators of their own.
    begins_B |= _generator(self._seed, 2**64 - 1 - step).random(len(begins_B)) < self._reset_probability
    offsets_B, begins_B = offsets_B[rows], begins_B[rows]
    starts_BT = np.zeros((len(offsets_B), self._length), bool)
    starts_BT[:, 0] = begins_B
    return _gather(self._split, offsets_B, self._length, starts_BT, self._end_of_text)


def share_out(rows: int, weights: Sequence[float]) -> list[int]:
  """`rows` in whole numbers by weight, at least one each; the largest remainders are rounded up."""
  if rows < len(weights):
    raise errors.UserError(f'training.batch_size={rows} is less than the {len(weights)} corpora of data.mixture, which need a row each')
  shares = [1] * len(weights)
  for _ in range(rows - len(weights)):
    lacking = [rows * weight - share for weight, share in zip(weights, shares, strict=True)]
    shares[lacking.index(max(lacking))] += 1
  return shares


Reader = RandomWindows | ShuffledWindows | ContiguousStreams


class EvaluationRows:
  """The text cut into rows that depend on nothing but it: every token except the first is a target exactly once.

  Row r reads tokens r * stride ... r * stride + T - 1. The first row predicts all that follow them, a later one the last `stride`
  of those, so that each of its targets has at least T - stride tokens of context; the last row is padded.

  Args:
    split: the text; at least 2 tokens.
    row_length: T.
    stride: at most T, which lets rows not overlap.
    end_of_text: as `RandomWindows` has it.
  """

  def __init__(self, split: tokens.Split, row_length: int, stride: int, end_of_text: int | None = None):
    _check_sizes(1, row_length)
    if not 1 <= stride <= row_length:
      raise errors.UserError(f'stride={stride} is not in [1, {row_length}], the tokens that a row has')
    if len(split.tokens) < 2:
      raise errors.UserError(f'the split has {len(split.tokens)} tokens: evaluation needs at least 2')
    self._split, self._row_length, self._stride, self._end_of_text = split, row_length, stride, end_of_text
    self.num_rows = 1 + max(0, -(-(len(split.tokens) - 1 - row_length) // stride))

  def batch(self, first: int, stop: int) -> tuple[Batch, np.ndarray]:
    """Rows first ... stop - 1, and each target's place in the text, [B, T].

    Rows past the last one weigh 0, so that any batch size may step over the text.
    """
    length, split = self._row_length, self._split
    rows_B = np.arange(first, stop)
    places_BT = rows_B[:, None] * self._stride + np.arange(length + 1)
    inside_BT = (places_BT < len(split.tokens)) & (rows_B < self.num_rows)[:, None]
    known_BT = np.where(inside_BT, places_BT, 0)
    read_BT = np.where(inside_BT, split.tokens[known_BT], 0).astype(np.int32)
    counts_BT = inside_BT[:, 1:] & ((rows_B == 0)[:, None] | (np.arange(length) >= length - self._stride))
    if split.is_reply is not None:
      counts_BT &= split.is_reply[known_BT[:, 1:]]
    starts_BT = None if self._end_of_text is None else (read_BT[:, :-1] == self._end_of_text) & inside_BT[:, :-1]
    return Batch(read_BT[:, :-1], read_BT[:, 1:], counts_BT.astype(np.float32), starts_BT), places_BT[:, 1:]


def _generator(seed: int, count: int) -> np.random.Generator:
  # Counter-based: the n-th generator costs as much as the first.
  return np.random.Generator(np.random.Philox(key=np.array([seed, count], np.uint64)))


def _gather(split: tokens.Split, offsets_B: np.ndarray, length: int, starts_BT: np.ndarray | None, end_of_text: int | None) -> Batch:
  # Rows of a view of all windows, T + 1 wide: copied whole, 9 times faster than an index for each token.
  windows_BT = np.lib.stride_tricks.sliding_window_view(np.asarray(split.tokens), length + 1)[offsets_B].astype(np.int32)
  if end_of_text is not None:
    ends_BT = windows_BT[:, :-1] == end_of_text
    starts_BT = ends_BT if starts_BT is None else starts_BT | ends_BT
  if split.is_reply is None:
    weights_BT = np.ones((len(offsets_B), length), np.float32)
  else:
    is_reply = np.lib.stride_tricks.sliding_window_view(np.asarray(split.is_reply), length + 1)
    weights_BT = is_reply[offsets_B][:, 1:].astype(np.float32)
  return Batch(windows_BT[:, :-1], windows_BT[:, 1:], weights_BT, starts_BT)


def _check_sizes(batch_size: int, length: int) -> None:
  if batch_size < 1 or length < 1:
    raise errors.UserError(f'training.batch_size={batch_size} and training.sequence_length={length} must be at least 1')
