"""Any number of prompts cut into batches that fit, and their texts put in order again."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from textgen_jax import errors
from textgen_jax.sampling import batch as batch_lib
from textgen_jax.sampling import knobs
from textgen_jax.sampling.generate import Completion


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is to be made."""

  batch: batch_lib.Batch  # of all prompts
  batch_size: int
  batches: list[list[int]]  # of prompts' numbers
  transforms: Sequence[knobs.Transform]

  def texts(self, batches: Sequence[list[int]]) -> int:
    """How many texts these batches give."""
    return sum(self.batch.settings[i].num_samples for batch in batches for i in batch)

  def in_order(self, made: Sequence[list[Completion]]) -> list[Completion]:
    """The batches' texts in the prompts' order."""
    of_prompt: dict[int, list[Completion]] = {}
    for batch, texts in zip(self.batches, made, strict=True):
      at = 0
      for i in batch:
        of_prompt[i] = texts[at : at + self.batch.settings[i].num_samples]
        at += self.batch.settings[i].num_samples
    return [text for i in range(len(self.batch.prompts)) for text in of_prompt[i]]

  def read(self, batch: list[int], rows: Sequence[Any], where: str) -> list[Completion]:
    """A batch's texts from `Completion.row()` of each. Raises UserError, which names `where`, for rows of anything else."""
    try:
      made = [Completion(**row) for row in rows]
      if [one.prompt for one in made] != [self.batch.prompts[i] for i in batch for _ in range(self.batch.settings[i].num_samples)]:
        raise ValueError('other prompts')
      for one in made:
        if one.alternatives:  # JSON has no pairs
          one.alternatives = [[(i, log_prob) for i, log_prob in others] for others in one.alternatives]
    except (TypeError, ValueError) as error:
      raise errors.UserError(f'{where} is damaged: delete it, or name another output') from error
    return made


def cut(lengths: Sequence[int], rows: Sequence[int], batch_size: int) -> list[list[int]]:
  """The prompts' numbers, the longest first, in batches of at most so many rows, or of one prompt that has more."""
  batches: list[list[int]] = []
  room = 0
  for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
    if rows[i] > room:
      batches.append([])
      room = batch_size
    batches[-1].append(i)
    room -= rows[i]
  return batches
