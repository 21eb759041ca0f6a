"""Any number of prompts cut into batches that fit, and their texts put in order again."""

import dataclasses
import math
import types
import typing
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

  def read(self, batches: Sequence[Sequence[Any]], where: str) -> list[list[Completion]]:
    """The texts of the first batches, from `Completion.row()` of each.

    Raises:
      UserError: names `where`, a journal: it holds anything else.
    """
    if len(batches) > len(self.batches):
      raise errors.UserError(
        f'{where} has {len(batches)} batches, and {len(self.batches)} are to be made: delete it, or name another output'
      )
    try:
      return [self._batch(self.batches[number], rows) for number, rows in enumerate(batches)]
    except (TypeError, ValueError) as error:
      raise errors.UserError(f'{where} is damaged ({error!s:.100}): delete it, or name another output') from error

  def _batch(self, batch: list[int], rows: Sequence[Any]) -> list[Completion]:
    made = [_completion(row) for row in rows]
    if [one.prompt for one in made] != [self.batch.prompts[i] for i in batch for _ in range(self.batch.settings[i].num_samples)]:
      raise ValueError('other prompts')
    return made


def _completion(row: Any) -> Completion:
  """The reverse of `Completion.row()`, after JSON. Raises TypeError for anything else."""
  if not isinstance(row, dict):
    raise TypeError(f'{row!r:.60} is not an object')
  hints = typing.get_type_hints(Completion)
  unknown = [name for name in row if name not in hints]
  if unknown:
    raise TypeError(errors.not_among('field', unknown[0], hints))
  return Completion(**{name: _value(name, value, hints[name]) for name, value in row.items()})


def _value(name: str, value: Any, hint: Any) -> Any:
  """A field's value as `hint` says. JSON has no pairs, which are lists in it, and no -inf, the only number that is null in it."""
  parts = typing.get_args(hint)
  if isinstance(hint, types.UnionType):  # `or None`, where `row()` leaves the field out
    return _value(name, value, parts[0])
  if parts:
    each = parts * len(value) if typing.get_origin(hint) is list and isinstance(value, list) else parts
    if not isinstance(value, list) or len(value) != len(each):
      raise TypeError(f'{name}={value!r:.60} must be of type {hint}')
    return typing.get_origin(hint)(_value(name, one, part) for one, part in zip(value, each, strict=True))
  if hint is float and value is None:
    return -math.inf
  if type(value) is not hint:
    raise TypeError(f'{name}={value!r:.60} must be of type {hint.__name__}')
  return value


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
