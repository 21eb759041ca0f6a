"""What a model has read of some lines of tokens: its cache, and when the context must be read anew."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from textgen_jax import axes
from textgen_jax.models import base
from textgen_jax.sampling import decode

SEGMENT = 32  # tokens between two looks at the host; the looks cost 4-5% of the time
MAX_CHUNK = 256  # prompt tokens read in one call


class Reader:
  """Keeps one model's cache behind growing lines; all but a line's last token is in it.

  Args:
    model: any model of the contract.
    params: its parameters.
    lines: ids of each line, at least one.
    ahead: tokens that one call may read past the last one, to be taken back.

  Attributes:
    cache: of `lines`, in their order; its user puts back what it made of it.
    capacity: slots of the cache.
    lines: whoever draws puts what was drawn there.
  """

  def __init__(self, model: base.LanguageModel, params: Any, lines: Sequence[list[int]], ahead: int = 0):
    self.model, self.params, self.cache = model, params, None
    self.lines, self._ahead = list(lines), ahead
    self._starts = [0] * len(self.lines)  # where in the line the context that the model sees begins
    self._used = self.capacity = self._chunk = self._most = 0

  def room(self) -> int | None:
    """How many tokens may still be read before the context must be read anew; None: any number."""
    if not self.model.slides:
      return None
    return self.model.context_length - max(len(line) - 1 - start for line, start in zip(self.lines, self._starts, strict=True))

  def read(self, more: int, segment: int) -> None:
    """Begins the cache anew with what each line's model may see; `more` tokens will follow, in segments."""
    kept = max(1, self.model.context_length - self.model.context_length // 4)
    if self.model.slides:
      full = self.model.context_length
      self._starts = [len(x) - kept if len(x) - 1 - start >= full else start for x, start in zip(self.lines, self._starts, strict=True)]
    contexts = [line[start:-1] for line, start in zip(self.lines, self._starts, strict=True)]
    longest = max(map(len, contexts))
    self._chunk = axes.power_of_two(min(max(longest, 1), MAX_CHUNK), low=16)
    if self.model.window is not None:
      self._chunk = min(self._chunk, self.model.window)
    self._used = -(-longest // self._chunk) * self._chunk
    self._most = -(-(self._used + more + self._ahead) // 64) * 64
    # Attention's cost follows the capacity, and each capacity is compiled, for a second or so: a short text has one.
    whole = self._bounded(self._most)
    first = axes.power_of_two(self._used + segment + self._ahead, low=128)
    self.capacity = whole if whole <= 256 else min(first, whole)
    self.cache = decode.new_cache(self.model, self.params, len(contexts), self.capacity, self._ahead)
    # Lines end together, so that all rows write at one place from then on.
    tokens_BT = np.zeros((len(contexts), self._used), np.int32)
    valid_BT = np.zeros((len(contexts), self._used), bool)
    for b, context in enumerate(contexts):
      tokens_BT[b, self._used - len(context) :] = context
      valid_BT[b, self._used - len(context) :] = True
    for low in range(0, self._used, self._chunk):
      part = np.s_[:, low : low + self._chunk]
      with decode.compile_once(self.model, len(contexts), self._chunk, self.capacity):
        self.cache = decode.prefill(self.model, self.params, self.cache, tokens_BT[part], valid_BT[part])

  def reserve(self, more: int) -> None:
    """Room for `more` tokens a line. Attention's cost follows the text: a full cache doubles, up to the text's end or its ring."""
    self._used += more
    needed = min(axes.power_of_two(self._used + self._ahead), self._most)
    capacity = self._bounded(max(self.capacity, needed))
    if capacity > self.capacity:
      self.cache = decode.grow_cache(self.model, self.cache, capacity)
      self.capacity = capacity

  def keep(self, kept: Sequence[int]) -> None:
    """Lets go of all lines but these, in this order; they may repeat."""
    self.cache = base.reorder_cache(self.cache, np.array(kept, np.int32))
    self.lines = [self.lines[i] for i in kept]
    self._starts = [self._starts[i] for i in kept]

  def _bounded(self, capacity: int) -> int:
    """A model with a window needs no more than a ring that holds it while a chunk is written."""
    if self.model.window is None or self.model.slides:
      return capacity
    return min(capacity, self.model.window + max(self._chunk, self._ahead + 1) - 1)
