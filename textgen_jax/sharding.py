"""The device mesh, and where every parameter, batch and activation lies on it."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from textgen_jax import axes, errors, processes, trees
from textgen_jax.models import base

MOST_CPU_DEVICES = 8  # each holds a copy of the state and meets the others in every sum; more than 2 are unmeasured
MOST_TOLD_CPU_DEVICES = 512  # each is a thread and more: 200 took 21 s to train a few steps, 9,999 more than a minute to begin
MESH_AXES = ('data', 'fsdp', 'tensor')


def _default_rules() -> dict[str, list[str]]:
  rules: dict[str, list[str]] = {name: [] for name in axes.ALL}
  rules |= {axes.BATCH: ['data', 'fsdp'], axes.EMBED: ['fsdp']}
  # An LSTM's gates stay whole: split on a mesh of 2 x 2 x 2 they had other gradients (losses off by 6e-4), which isn't understood yet.
  return rules | {name: ['tensor'] for name in (axes.HEADS, axes.MLP, axes.VOCAB)}


@dataclasses.dataclass(kw_only=True)
class ShardingConfig:
  """Sizes of the mesh, and which mesh axes each logical axis (`axes.py`) is split over."""

  data: int = -1  # copies of the parameters; -1: all devices that are left
  fsdp: int = 1  # devices that share one copy of parameters and optimizer state; -1: all that are left
  tensor: int = 1  # devices that share the work of each row: heads, hidden units and vocabulary; -1: all that are left
  cpu_devices: int = 0  # of a CPU; 0: one a core where rows divide, 16 each for an LSTM; one of all for other models with bfloat16 products
  rules: dict[str, list[str]] = dataclasses.field(default_factory=_default_rules)


def check(config: ShardingConfig) -> None:
  """Raises UserError for sizes and rules that make no mesh on any number of devices."""
  for name in MESH_AXES:
    size = getattr(config, name)
    if size != -1 and size < 1:
      raise errors.UserError(f'sharding.{name}={size} is neither -1 nor at least 1')
  if not 0 <= config.cpu_devices <= MOST_TOLD_CPU_DEVICES:
    raise errors.UserError(f'sharding.cpu_devices={config.cpu_devices} is not in [0, {MOST_TOLD_CPU_DEVICES}]')
  rest = [f'sharding.{name}=-1' for name in MESH_AXES if getattr(config, name) == -1]
  if len(rest) > 1:
    raise errors.UserError(f'{" and ".join(rest)}: only one of them can take the devices that are left')
  for name in axes.ALL:
    unknown = [axis for axis in config.rules.get(name, ['(missing)']) if axis not in MESH_AXES]
    if unknown:
      raise errors.UserError(f'sharding.rules[{name!r}] names {unknown[0]!r}, which is no mesh axis ({", ".join(MESH_AXES)})')
  # One array can't be split twice over one mesh axis.
  meet = [(axes.BATCH, axes.TIME), *((axes.EMBED, name) for name in (axes.HEADS, axes.MLP, axes.GATES, axes.VOCAB, axes.POSITION))]
  for one, other in meet:
    if shared := set(config.rules[one]) & set(config.rules[other]):
      raise errors.UserError(f'sharding.rules splits {one!r} and {other!r} of one array over the same mesh axis, {min(shared)!r}')


def cpu_devices(config: ShardingConfig, rows: int, fewest_rows: int = 1) -> int:
  """How many devices the cores are split into.

  Each has a copy of the state. XLA runs the work between matrix products on one core; with a share of the rows each, all cores have some
  of it: 52 ms a step became 39 (nanoGPT's CPU setting, 2 cores).

  Args:
    config: an explicit mesh is left alone.
    rows: of a micro-batch.
    fewest_rows: that each of several devices has.
  """
  if config.cpu_devices:
    return config.cpu_devices
  if (config.data, config.fsdp, config.tensor) != (-1, 1, 1):
    return 1
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  most = max(1, min(cores, _quota(), MOST_CPU_DEVICES, rows // fewest_rows))
  return max(n for n in range(1, most + 1) if rows % n == 0)


def _quota(path: str = '/sys/fs/cgroup/cpu.max') -> int:
  """Cores that a container may use, at least one: its threads may be seen on all of the machine's."""
  try:
    with open(path) as file:
      most, period = file.read().split()
    return max(1, int(most) // int(period))
  except (OSError, ValueError):  # 'max', or no container
    return MOST_CPU_DEVICES


def mesh_shape(config: ShardingConfig, count: int) -> tuple[int, ...]:
  """How many of `count` devices stand along each of MESH_AXES; raises UserError where the sizes make no mesh of them."""
  sizes = {name: getattr(config, name) for name in MESH_AXES}
  known = math.prod(size for size in sizes.values() if size != -1)
  if -1 in sizes.values() and count % known:
    told = ', '.join(f'{name}={size}' for name, size in sizes.items())
    raise errors.UserError(f"{count} devices aren't divisible by sharding sizes {told}")
  if -1 not in sizes.values() and known != count:
    told = ' x '.join(f'sharding.{name}={size}' for name, size in sizes.items())
    raise errors.UserError(f'{told} is not the number of devices, {count}')
  return tuple(count // known if size == -1 else size for size in sizes.values())


def make_mesh(config: ShardingConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh `data x fsdp x tensor` over `devices`, which need not be here; None: all that are.

  Slices of a TPU, between which the network is slower, each have whole copies of the parameters: `data` goes over them.
  """
  devices = jax.devices() if devices is None else devices
  try:
    shape = mesh_shape(config, len(devices))
  except errors.UserError as error:
    if devices[0].platform != 'cpu':
      raise
    raise errors.UserError(f'{error}; of a CPU train.py makes N where sharding.cpu_devices=N says so') from error
  # The default axis type, Explicit, breaks linen's modules.
  types = (AxisType.Auto,) * len(MESH_AXES)
  if devices[0].platform != 'tpu':
    return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
  slices = len({getattr(one, 'slice_index', 0) for one in devices})
  if shape[0] % slices:
    raise errors.UserError(f"sharding.data={shape[0]} isn't divisible by the {slices} slices, each of which has whole copies")
  inner, outer = (shape[0] // slices, *shape[1:]), (slices, *(1,) * len(shape[1:]))
  # Any sizes whose product is the number of devices, as elsewhere.
  if slices == 1:
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  else:
    grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
  return Mesh(grid, MESH_AXES, axis_types=types)


def abstract_mesh(config: ShardingConfig, count: int) -> AbstractMesh:
  """The same mesh of `count` devices that there are none of: shapes and shardings can be made for it, and nothing compiled."""
  return AbstractMesh(mesh_shape(config, count), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def told(mesh: Mesh) -> str:
  """The mesh's sizes, such as 'data=4 fsdp=2 tensor=1'."""
  return ' '.join(f'{name}={size}' for name, size in mesh.shape.items())


def _devices_along(mesh: Mesh, mesh_axes: Iterable[str]) -> int:
  return math.prod(mesh.shape[axis] for axis in mesh_axes)


def _spec(names: tuple[str | None, ...], rules: Mapping[str, Sequence[str]]) -> PartitionSpec:
  return PartitionSpec(*(tuple(rules[name]) or None if name else None for name in names))


@dataclasses.dataclass(frozen=True)
class MeshConstrain:
  """Keeps activations split as the rules say; hashable, so that models stay static arguments."""

  mesh: Mesh
  rules: tuple[tuple[str, tuple[str, ...]], ...]

  def __call__(self, x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Axes that their devices don't divide, such as few heads, stay whole, and those whose devices an axis before them has."""
    rules, fits = dict(self.rules), []
    taken: set[str] = set()
    for name, size in zip(names, x.shape, strict=True):
      fits.append(name if name and size % self.ways(name) == 0 and taken.isdisjoint(rules[name]) else None)
      taken.update(rules[name] if name and fits[-1] else ())
    return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self._spec(tuple(fits))))

  def ways(self, name: str) -> int:
    """How many ways a logical axis is split."""
    return _devices_along(self.mesh, dict(self.rules)[name])

  def split(
    self, function: Callable[..., Any], arguments: tuple[tuple[str | None, ...], ...], result: tuple[str | None, ...]
  ) -> Callable[..., Any]:
    """`function`, each device on its own part of all that is split: the compiler can't split a kernel by itself.

    Args:
      function: of arrays, or trees of arrays whose axes are alike.
      arguments: the logical axes of each; those that stay whole may be left out at the end.
      result: those of what it gives.
    """
    specs = tuple(map(self._spec, arguments))
    return jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=self._spec(result), check_vma=False)

  def _spec(self, names: tuple[str | None, ...]) -> PartitionSpec:
    return _spec(names, dict(self.rules))


def make_constrain(config: ShardingConfig, mesh: Mesh) -> base.Constrain:
  """What models call on their activations."""
  if mesh.size == 1:
    return base.unconstrained
  return MeshConstrain(mesh, tuple((name, tuple(mesh_axes)) for name, mesh_axes in config.rules.items()))


def make_spread(mesh: Mesh) -> Callable[[Callable[[jax.Array], jax.Array]], Callable[[jax.Array], jax.Array]]:
  """Has each device work on its share of a stack of arrays; what is added to make it even is zeros.

  Spelled out, because the compiler, told only how the stack is to lie, split each array in rows first and exchanged those one by one.
  """

  def spread(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    def share(stack: jax.Array) -> jax.Array:
      size = stack.shape[0] // mesh.size
      part = jax.lax.dynamic_slice_in_dim(stack, jax.lax.axis_index(MESH_AXES) * size, size)
      return jax.lax.all_gather(function(part), MESH_AXES, tiled=True)

    def whole(stack: jax.Array) -> jax.Array:
      padded = jnp.pad(stack, ((0, -stack.shape[0] % mesh.size), *((0, 0),) * (stack.ndim - 1)))
      return jax.shard_map(share, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)(padded)[: stack.shape[0]]

    return whole if mesh.size > 1 else function

  return spread


def one_copy(params: Any) -> Any:
  """Parameters that are all whole on every device, on one of them; else as they lie: one program takes no arrays of several places."""
  if not all(x.is_fully_replicated for x in jax.tree.leaves(params)):
    return params
  return jax.tree.map(lambda x: x.addressable_data(0), params)


def is_local(x: jax.Array | np.ndarray) -> bool:
  """Whether this process can read all of an array by itself."""
  return isinstance(x, np.ndarray) or x.is_fully_addressable or x.is_fully_replicated


def to_host(x: jax.Array | np.ndarray) -> np.ndarray:
  """The whole array; where processes hold parts of it each gets those of the others, so all have to ask."""
  if is_local(x):
    return np.asarray(x)
  from jax.experimental import multihost_utils  # that a process alone need not wait for

  return multihost_utils.process_allgather(x, tiled=True)


def place(tree: Any, shardings: Any) -> Any:
  """Arrays that this process has whole, on the devices; shardings are one for all, or a tree of them.

  On several processes each has the same, which isn't checked: `jax.device_put` would send all to all to see.
  """
  if processes.count() == 1:
    return jax.device_put(tree, shardings)
  if isinstance(shardings, NamedSharding):
    shardings = jax.tree.map(lambda x: shardings, tree)
  return jax.tree.map(lambda x, s: _assemble(np.asarray(x), np.shape(x), s, 0, 0), tree, shardings)


def own_rows(sharding: NamedSharding, rows: int) -> slice:
  """The rows, of so many, that this process's devices hold: the span from the first to the last of them."""
  held = [index[0].indices(rows) for index in sharding.addressable_devices_indices_map((rows,)).values() if index]
  return slice(min(low for low, _, _ in held), max(high for _, high, _ in held))


def place_rows(tree: Any, sharding: NamedSharding, rows: int, first: int, axis: int = 0) -> Any:
  """Arrays of which this process has `own_rows` alone, from row `first` of `rows` on, on the devices; rows are their axis `axis`."""
  if processes.count() == 1:
    return jax.device_put(tree, sharding)

  def shape(x: np.ndarray) -> tuple[int, ...]:
    return (*x.shape[:axis], rows, *x.shape[axis + 1 :])

  return jax.tree.map(lambda x: _assemble(x, shape(x), sharding, first, axis), tree)


def _assemble(own: np.ndarray, shape: tuple[int, ...], sharding: NamedSharding, first: int, axis: int) -> jax.Array:
  """An array of `shape` from what each process has `own`, which begins at place `first` of `axis`."""

  def part(index: tuple[slice, ...] | None) -> np.ndarray:
    if not index:
      return own
    low, high, _ = index[axis].indices(shape[axis])
    return own[(*index[:axis], slice(low - first, high - first), *index[axis + 1 :])]

  return jax.make_array_from_callback(shape, sharding, part)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(config: ShardingConfig, mesh: Mesh) -> NamedSharding:
  """Rows over the devices; whatever follows B stays whole."""
  return NamedSharding(mesh, _spec((axes.BATCH,), config.rules))


def stacked(sharding: NamedSharding) -> NamedSharding:
  """Of arrays that are stacked along a new first axis, which stays whole."""
  return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def batch_divisor(config: ShardingConfig, mesh: Mesh) -> int:
  """How many ways rows are split."""
  return _devices_along(mesh, config.rules[axes.BATCH])


def param_shardings(abstract_boxed_params: Any, config: ShardingConfig, mesh: Mesh) -> Any:
  """Each parameter's sharding, from its logical axis names.

  Args:
    abstract_boxed_params: params as `eval_shape` of `init` gives them, axis names included.
    config: the rules.
    mesh: the mesh.

  Raises:
    UserError: a parameter's axis isn't divisible by the mesh axes that it is split over, or has no rule.
  """
  rules = [(name, tuple(mesh_axes) or None) for name, mesh_axes in config.rules.items()]
  specs = nn.get_partition_spec(abstract_boxed_params)
  leaves = trees.named_leaves(nn.unbox(abstract_boxed_params))
  # Flax would leave an axis whole that it finds no rule for, without a word.
  missed = [
    f'{name} ({axis})' for (name, _), spec in zip(leaves, jax.tree.leaves(specs), strict=True) for axis in spec
    if axis is not None and axis not in config.rules
  ]
  if missed:
    raise errors.UserError(f'sharding.rules has no rule for these axes of parameters: {", ".join(missed)}')
  shardings = nn.logical_to_mesh_sharding(specs, mesh, rules)
  for (name, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
    for size, split in zip(leaf.shape, sharding.spec, strict=False):
      parts = _devices_along(mesh, [split] if isinstance(split, str) else split or ())
      if size % parts:
        raise errors.UserError(f'parameter {name} has an axis of {size}, which {parts} devices along {split} do not divide')
  return shardings


def optimizer_shardings(abstract_opt_state: Any, abstract_params: Any, shardings: Any, mesh: Mesh) -> Any:
  """Moments lie as their parameters do, known by name and shape; counts, and sums over rows and columns, are copied to every device."""
  params = trees.named_leaves(abstract_params)
  places = {name: (leaf.shape, sharding) for (name, leaf), sharding in zip(params, jax.tree.leaves(shardings), strict=True)}

  def place(name: str, leaf: Any) -> NamedSharding:
    parts = name.split('/')
    owner = next((found for i in range(len(parts)) if (found := places.get('/'.join(parts[i:])))), None)
    return owner[1] if owner and owner[0] == leaf.shape else replicated(mesh)

  return trees.map_with_names(place, abstract_opt_state)
