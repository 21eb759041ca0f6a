"""What devices must tell each other in a training step, derived from how parameters and rows are split."""

import collections
import math
from collections.abc import Collection, Iterable
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from textgen_jax import axes, backend, program, sharding, trees
from textgen_jax.models import build
from textgen_jax.planning import devices, footprint


class Traffic(NamedTuple):
  """Of one kind, over one group of devices, in a step."""

  kind: str  # a collective, as HLO calls it
  over: str  # the mesh axes, such as 'data' or 'data x fsdp'
  bytes: int  # that each device receives, in a ring
  seconds: float | None  # alone on the links; None where their bandwidth isn't known
  waits: bool  # whether the next product needs it: an activation; parameters and gradients can come and go meanwhile


def of_step(parts: program.Program, topology: devices.Topology) -> list[Traffic]:
  """In a ring of n devices each receives (n - 1) / n of what is gathered or scattered, and twice that of what is summed everywhere."""
  totals: collections.Counter[tuple[str, tuple[str, ...], bool]] = collections.Counter()
  for kind, over, waits, size in [*_of_params(parts), *_of_activations(parts)]:
    ways = math.prod(parts.mesh.shape[axis] for axis in over)
    totals[kind, over, waits] += int(size * (2 if kind == 'all-reduce' else 1) * (ways - 1) / ways)
  found = []
  for (kind, over, waits), size in totals.items():
    if size:
      bandwidth = topology.bandwidth(*span(parts.mesh, over))
      found.append(Traffic(kind, ' x '.join(over), size, None if bandwidth is None else size / bandwidth if bandwidth else 0.0, waits))
  return found


def span(mesh: Mesh | AbstractMesh, over: Collection[str]) -> tuple[int, int]:
  """How far the devices of a group stand apart, and how many they are: the mesh's last axis is the densest."""
  last = max(sharding.MESH_AXES.index(axis) for axis in over)
  return math.prod(mesh.shape[axis] for axis in sharding.MESH_AXES[last + 1 :]), math.prod(mesh.shape[axis] for axis in over)


_Part = tuple[str, tuple[str, ...], bool, float]  # kind, mesh axes, whether it is waited for, bytes of the whole array


def _of_params(parts: program.Program) -> Iterable[_Part]:
  """Split parameters are gathered for the forward pass and once more for the backward one, in the products' type. Of tables, a TPU's
  compiler gathers one copy; a GPU's gathers that of the output twice, and that of tokens in float32.

  Gradients are summed where rows are split, those of tables in float32: each device gets its part, or all where the parameter is whole.
  Each micro-batch does so anew.
  """
  c = parts.experiment.training
  rows = parts.experiment.sharding.rules[axes.BATCH]
  itemsize, times = footprint.compute_itemsize(parts.experiment.model), c.accumulation_steps
  leaves = zip(trees.named_leaves(parts.abstract.params), jax.tree.leaves(parts.shardings.params), strict=True)
  for (name, leaf), place in leaves:
    split = footprint.axes_of(place)
    gathered = tuple(axis for axis in sharding.MESH_AXES if axis in split and axis in rows)
    summed = tuple(axis for axis in sharding.MESH_AXES if axis not in split and axis in rows)
    kept = math.prod(parts.mesh.shape[axis] for axis in split if axis not in rows)
    whole = leaf.size / kept  # numbers, when it is gathered
    is_kernel = name.endswith('kernel') and not footprint.is_table(name)
    slope_size = itemsize if is_kernel else footprint.FLOAT
    if gathered:
      yield 'all-gather', gathered, False, times * (2 if is_kernel or backend.name() == 'gpu' else 1) * whole * itemsize
      yield 'reduce-scatter', gathered, False, times * whole * slope_size
    if summed:
      shard = whole / math.prod(parts.mesh.shape[axis] for axis in gathered)
      yield 'all-reduce', summed, False, times * shard * slope_size
  if parts.mesh.size > 1:
    for made, read in footprint.muon_stacks(parts):  # each device works on some of the matrices, whole, and hands on what it makes
      yield 'all-gather', sharding.MESH_AXES, True, (made + read) * footprint.FLOAT


def _of_activations(parts: program.Program) -> Iterable[_Part]:
  """Where heads and hidden units are split, each block's two branches are summed, forward and backward, and once more where they are
  computed again; so is what leaves the table of a split vocabulary, and the gradient that enters it.
  """
  e, c = parts.experiment, parts.experiment.training
  tensor = tuple(axis for axis in e.sharding.rules[axes.HEADS] if parts.mesh.shape[axis] > 1)
  if not tensor or build.carries(e.model):
    return
  tokens = c.batch_size // parts.row_ways * c.sequence_length
  residual = tokens * e.model.dim * footprint.compute_itemsize(e.model)
  passes = 3 if footprint.remat_of(e.model) == 'full' else 2
  yield 'all-reduce', tensor, True, (2 * passes * e.model.num_layers + 2) * residual
