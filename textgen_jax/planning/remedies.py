"""Which settings would make a run fit, found by trying them with the plan's own estimate."""

import copy
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from textgen_jax import errors, sharding
from textgen_jax import experiment as experiment_lib
from textgen_jax.planning import devices, estimate, footprint

Changes = Mapping[str, Any]  # dotted field -> value


def advice(experiment: experiment_lib.Experiment, vocab_size: int, topology: devices.Topology, factor: float = 1.0) -> str:
  """The rest of a sentence that says what would fit: each of some settings alone, all together, or more devices.

  Args:
    experiment: resolved; it doesn't fit.
    vocab_size: ids of the tokenizer.
    topology: where it doesn't.
    factor: how many times the plan's estimate it takes, where a compiler has told.
  """
  fits = functools.partial(_fits, experiment, vocab_size, factor)

  def first(kind: list[Changes]) -> Changes | None:
    if kind and not kind[-1].keys() & {'sharding.fsdp'} and not fits(kind[-1], topology):
      return None  # the last takes least; but a mesh may not divide a parameter
    return next((one for one in kind if fits(one, topology)), None)

  kinds = [list(_meshes(experiment, topology)), list(_remats(experiment)), list(_micro_batches(experiment, topology))]
  found = list(filter(None, map(first, kinds)))
  if found:
    return 'would fit with: ' + '; or '.join(map(_told, found))
  together = _all(experiment, topology, {name: value for kind in kinds[:2] for changes in kind[-1:] for name, value in changes.items()})
  if fits(together, topology):
    return f'would fit with: {_told(together)}'
  for larger in topology.larger():
    split = {'sharding.data': 1, 'sharding.fsdp': -1}
    for changes in (split, _all(experiment, larger, split | {name: together[name] for name in together if name == 'model.remat'})):
      if fits(changes, larger):
        return f'would fit with: --topology={larger.name}, {_told(changes)}'
  return 'fewer parameters (model.dim, model.num_layers), shorter rows (training.sequence_length) or many more devices take less of each'


def _all(experiment: experiment_lib.Experiment, topology: devices.Topology, changes: Changes) -> Changes:
  """`changes`, and micro-batches of as few rows as their mesh has devices for."""
  steps = [one['training.accumulation_steps'] for one in _micro_batches(_changed(experiment, changes), topology)]
  return {**changes, 'training.accumulation_steps': steps[-1]} if steps else changes


def _changed(experiment: experiment_lib.Experiment, changes: Changes) -> experiment_lib.Experiment:
  changed = copy.deepcopy(experiment)
  for name, value in changes.items():
    group, field = name.split('.')
    setattr(changed, group, dataclasses.replace(getattr(changed, group), **{field: value}))
  return changed


def _told(changes: Changes) -> str:
  return ', '.join(f'{name}={value}' for name, value in changes.items())


def _fits(experiment: experiment_lib.Experiment, vocab_size: int, factor: float, changes: Changes, topology: devices.Topology) -> bool:
  changed = _changed(experiment, changes)
  try:
    experiment_lib.check(changed)
    needs = factor * estimate.make(changed, vocab_size, topology).footprint.peak
  except errors.UserError:
    return False
  return topology.device.memory_bytes is None or needs <= topology.device.memory_bytes


def _meshes(experiment: experiment_lib.Experiment, topology: devices.Topology) -> Iterator[Changes]:
  """More devices that share one copy of the state."""
  c = experiment.sharding
  tensor = max(c.tensor, 1)
  fsdp = 2 * c.fsdp if c.fsdp > 0 else topology.count
  while fsdp * tensor <= topology.count:
    if topology.count % (fsdp * tensor) == 0:
      yield {'sharding.data': topology.count // (fsdp * tensor), 'sharding.fsdp': fsdp} if c.data != -1 else {'sharding.fsdp': fsdp}
    fsdp *= 2


def _remats(experiment: experiment_lib.Experiment) -> Iterator[Changes]:
  choices = ('none', 'dots', 'full')  # the less is kept, the later
  if hasattr(experiment.model, 'remat'):
    yield from ({'model.remat': remat} for remat in choices[choices.index(footprint.remat_of(experiment.model)) + 1 :])


def _micro_batches(experiment: experiment_lib.Experiment, topology: devices.Topology) -> Iterator[Changes]:
  """More of them, each of whose rows the mesh divides."""
  c = experiment.training
  try:
    mesh = sharding.abstract_mesh(experiment.sharding, topology.count)
  except errors.UserError:
    return
  ways = sharding.batch_divisor(experiment.sharding, mesh)  # type: ignore[arg-type]  # it reads the shape alone
  for steps in range(c.accumulation_steps + 1, c.batch_size // ways + 1):
    if c.batch_size % (steps * ways) == 0:
      yield {'training.accumulation_steps': steps}
