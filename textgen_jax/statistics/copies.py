"""Verbatim copies: where a generated text repeats the training text, character for character.

A suffix array (Manber and Myers 1993) over the training text answers whether a piece occurs in about log2(characters)
comparisons. Long copies aren't found character by character:

* how far a copy reaches is found in pieces of doubling size, each within the suffixes that hold the pieces before it;
* a copy that ends at `end` leaves one question, the first start from which the text up to `end + 1` occurs. All later starts
  share the answer, so it is bisected, from short pieces to long ones;
* in a run such as 'aaaa...' or 'ababab...' that is longer than the training text's, a copy would begin at every period. They
  are all one copy, shifted: the run's length is measured once and the shifts are written down without looking them up.

So a copy costs its length, not the square of it, and a run costs its length.
"""

import bisect
import dataclasses
import heapq
from collections.abc import Callable, Sequence

import numpy as np

from textgen_jax import errors

MAX_BYTES = 2**31 - 1  # a suffix array of more would take 8 bytes an entry


@dataclasses.dataclass(frozen=True)
class Copy:
  """A piece of a sample that occurs in the training text. Offsets and lengths count characters."""

  text: str
  sample_offset: int
  document: str         # the first one that holds it; empty where nothing was copied
  document_offset: int  # of its first occurrence there
  occurrences: int      # in all documents, overlapping ones too

  def __len__(self) -> int:
    return len(self.text)


class CopyIndex:
  """Finds verbatim copies of `documents`, pairs of name and text. No copy spans two documents.

  Characters become numbers of 1 byte where the documents know at most 253 of them, of 2 or 4 else, so that all offsets count
  characters. Takes 5 bytes a character; 6 or 8 where numbers take 2 or 4.

  Raises:
    UserError: over 2**31 - 1 bytes of numbers, or pydivsufsort isn't installed.
  """

  def __init__(self, documents: Sequence[tuple[str, str]]):
    self._names = [name for name, _ in documents]
    self._ends = np.cumsum([len(text) + 1 for _, text in documents], dtype=np.int64)  # a separator ends each
    known = np.zeros(0x110000, bool)
    for _, text in documents:
      known[_code_points(text)] = True
    num_known = int(known.sum())
    # 0 separates; 1 to num_known are characters of the documents; the next stands for those that only a sample has.
    width = next(width for width in (1, 2, 4) if num_known + 1 < 256**width)
    size = width * (int(self._ends[-1]) if documents else 0)
    if size > MAX_BYTES:
      raise errors.UserError(f'the training text takes {size} bytes: copies are found in at most {MAX_BYTES}')
    self._width = width
    self._numbers = np.where(known, np.cumsum(known), num_known + 1).astype(f'>u{width}')  # the bytes sort as the numbers do
    self._text = b''.join(self._encode(text) + bytes(width) for _, text in documents)
    self._suffixes = _suffix_array(self._text, width)

  def longest(self, sample: str) -> Copy:
    """The longest copy, the first one of equals; an empty one where no character is shared."""
    codes = self._encode(sample)
    for at_least in (64, 16, 4, 1):  # a high bar skips most of a sample, so it is tried first
      if found := self._maximal(codes, at_least):
        start, end = max(found, key=lambda one: one[1] - one[0])
        return self._copy(sample, codes, start, end)
    return Copy('', 0, '', 0, 0)

  def copies(self, sample: str, at_least: int = 50) -> list[Copy]:
    """Copies of at least so many characters, in the sample's order, none overlapping another.

    The longest is taken first, the first one of equals. What overlaps it counts without the overlap, where enough is left.

    Raises:
      UserError: `at_least` is below 1.
    """
    if at_least < 1:
      raise errors.UserError(f'at_least={at_least} is not at least 1')
    codes = self._encode(sample)
    waiting = [(start - end, start, end) for start, end in self._maximal(codes, at_least)]
    heapq.heapify(waiting)
    taken: list[tuple[int, int]] = []  # sorted
    while waiting:
      _, start, end = heapq.heappop(waiting)
      # What was taken is at least as long, so it lies at one side, never within.
      after = bisect.bisect_right(taken, (start, end))
      free_start = max(start, taken[after - 1][1]) if after else start
      free_end = min(end, taken[after][0]) if after < len(taken) else end
      if (free_start, free_end) == (start, end):
        taken.insert(after, (start, end))
      elif free_end - free_start >= at_least:
        heapq.heappush(waiting, (free_start - free_end, free_start, free_end))
    return [self._copy(sample, codes, start, end) for start, end in taken]

  def _encode(self, text: str) -> bytes:
    return self._numbers[_code_points(text)].tobytes()

  def _maximal(self, codes: bytes, at_least: int) -> list[tuple[int, int]]:
    """Starts and ends of all copies of at least so many characters that can't be lengthened at either side."""
    size = len(codes) // self._width
    found = []
    start = 0
    while start + at_least <= size:
      first = self._first_start(codes, start, start + at_least)
      if first > start:
        start = first
        continue
      end = self._reach(codes, start)
      found.append((start, end))
      if end == size:
        break
      following = self._first_start(codes, start + 1, end + 1)
      period = following - start
      if 2 * period <= end - start:
        # Where the sample goes on with this period, the same copy and what ends it come again, shifted.
        run_end = following + self._common(codes, following, codes, start)
        shifts = max(0, (run_end - end - 1) // period)
        if shifts:
          found += [(start + shift * period, end + shift * period) for shift in range(1, shifts + 1)]
          start, end = found[-1]
          if end == size:
            break
          following = self._first_start(codes, start + 1, end + 1)
      start = following
    return found

  def _first_start(self, codes: bytes, low: int, end: int) -> int:
    """The first start, at least `low`, from which the sample up to `end` occurs; `end` where its last character doesn't."""
    size = 1
    while end - size > low and self._occurs(codes, end - size, end):
      size *= 2
    low = max(low, end - size)
    return low + bisect.bisect_left(range(low, end), True, key=lambda start: self._occurs(codes, start, end))

  def _occurs(self, codes: bytes, start: int, end: int) -> bool:
    piece = codes[start * self._width : end * self._width]
    at = self._bisect(bisect.bisect_left, piece, 0, 0, len(self._suffixes))
    return at < len(self._suffixes) and self._piece(self._suffixes[at], len(piece)) == piece

  def _reach(self, codes: bytes, start: int) -> int:
    """The end of the longest copy that begins at `start`."""
    low, high = 0, len(self._suffixes)
    done, size = 0, 32
    while piece := codes[(start + done) * self._width : (start + done + size) * self._width]:
      at = self._bisect(bisect.bisect_left, piece, done, low, high)
      high_now = self._bisect(bisect.bisect_right, piece, done, at, high)
      if high_now == at:
        # The sorted neighbours share most with what isn't there.
        neighbours = [self._suffixes[i] for i in (at - 1, at) if low <= i < high]
        return start + done + max((self._common(codes, start + done, self._text, suffix + done) for suffix in neighbours), default=0)
      low, high = at, high_now
      done += len(piece) // self._width
      size *= 2
    return start + done

  def _bisect(self, side: Callable[..., int], piece: bytes, skipped: int, low: int, high: int) -> int:
    """Where `piece` sorts among the suffixes from low to high, which share their first `skipped` characters."""
    length = len(piece)
    return side(self._suffixes, piece, low, high, key=lambda suffix: self._piece(suffix + skipped, length))

  def _piece(self, at: int, num_bytes: int) -> bytes:
    return self._text[at * self._width : at * self._width + num_bytes]

  def _common(self, a: bytes, a_start: int, b: bytes, b_start: int) -> int:
    """How many characters two texts share from there on."""
    at_a, at_b = a_start * self._width, b_start * self._width
    done, size = 0, 64
    while True:
      one, other = a[at_a + done : at_a + done + size], b[at_b + done : at_b + done + size]
      if one != other or not one:
        length = min(len(one), len(other))
        differ = np.frombuffer(one, np.uint8, length) != np.frombuffer(other, np.uint8, length)
        return (done + (int(differ.argmax()) if differ.any() else length)) // self._width
      done += size
      size *= 2

  def _copy(self, sample: str, codes: bytes, start: int, end: int) -> Copy:
    piece = codes[start * self._width : end * self._width]
    low = self._bisect(bisect.bisect_left, piece, 0, 0, len(self._suffixes))
    high = self._bisect(bisect.bisect_right, piece, 0, low, len(self._suffixes))
    first = int(np.asarray(self._suffixes)[low:high].min())
    document = int(np.searchsorted(self._ends, first, side='right'))
    offset = first - (int(self._ends[document - 1]) if document else 0)
    return Copy(sample[start:end], start, self._names[document], offset, high - low)


def _code_points(text: str) -> np.ndarray:
  return np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), '<u4')


def _suffix_array(text: bytes, width: int) -> memoryview:
  """Starts of all suffixes in sorted order, counted in characters of `width` bytes. Gives Python's ints, which can't overflow."""
  try:
    import pydivsufsort  # heavy, and wanted here only
  except ImportError as error:
    raise errors.UserError("pydivsufsort is missing, which finds copies: pip install 'textgen_jax[inspect]'") from error
  if not text:
    return np.zeros(0, np.intc).data
  starts = pydivsufsort.divsufsort(text)
  if width > 1:
    starts = starts[starts % width == 0] // width
  return starts.data.cast('B').cast('i')
