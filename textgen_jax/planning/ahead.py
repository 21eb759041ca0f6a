"""The training step compiled ahead of time, for devices that aren't here."""

import contextlib
import copy
import dataclasses
import importlib.util
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from textgen_jax import backend, errors, memory, program, sharding
from textgen_jax import experiment as experiment_lib
from textgen_jax.data import windows
from textgen_jax.models import build
from textgen_jax.planning import devices, hlo
from textgen_jax.training import checkpoints

# What brings each compiler: the module it is found by, and what to install. Neither needs the device.
PLUGINS = {
  'tpu': ('libtpu', "'jax[tpu]=={jax}'"),
  'gpu': ('jax_plugins.xla_cuda13', '--no-deps jax-cuda13-pjrt=={jax} jax-cuda13-plugin=={jax}'),
}
# libtpu would ask a metadata server which TPU this machine has, and would let one process at a time load it.
TPU_ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
# What XLA must know of a GPU that isn't there: JAX's `target_config` of one that is. Sources: NVIDIA's tuning guides for Hopper and
# Ampere, and its data sheets.
GPU_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin}
  core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  l2_cache_size: {l2} memory_bandwidth: {bandwidth} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""
HOPPER = {'shared': 233_472, 'optin': 232_448, 'cores': 132, 'fpus': 128, 'clock': 1.98, 'l2': 52_428_800, 'major': 9}
GPUS = {
  'h100': HOPPER,
  'h200': HOPPER | {'l2': 62_914_560},
  'a100': {'shared': 167_936, 'optin': 166_912, 'cores': 108, 'fpus': 64, 'clock': 1.41, 'l2': 41_943_040, 'major': 8},
}
# Of each family: the field that names its kernel, the GPU's own, what is compiled instead, and what is said then.
STAND_INS = {
  'transformer': (
    'attention_kernel', 'cudnn', 'blocks',
    "cuDNN's attention is planned and compiled as `blocks`, as it can be compiled only where the GPU is",
  ),
  'lstm': (
    'recurrence_kernel', 'triton', 'plain',
    "the recurrence's kernel can be compiled only where the GPU is: the plain loop is planned, which takes more memory",
  ),
}  # fmt: skip
REMATERIALIZATION = re.compile('Involuntary full rematerialization')  # XLA copies an array whole to move it from one sharding to another


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says of the step."""

  peak_bytes: int  # of one device, the state included
  seconds: float
  collectives: dict[str, hlo.Said]
  rematerializations: int  # warnings


def stay_here(topology: devices.Topology) -> None:
  """Keeps JAX from looking for accelerators, and makes the CPU devices of a cpu topology. Before JAX's first use."""
  jax.config.update('jax_platforms', 'cpu')
  if topology.device.kind == 'cpu':
    with contextlib.suppress(RuntimeError):  # JAX is in use; too few devices are then an error of `devices_of`
      jax.config.update('jax_num_cpu_devices', topology.count)


def devices_of(topology: devices.Topology) -> list[Any]:
  """JAX's devices, to compile for. Raises UserError where their compiler isn't installed."""
  kind, device = topology.device.kind, topology.device
  if kind == 'cpu':
    if jax.device_count() != topology.count:
      raise errors.UserError(f'topology={topology.name!r}: JAX is in use with {jax.device_count()} CPU devices')
    return list(jax.devices())
  module, packages = PLUGINS[kind]
  if not _is_installed(module):
    raise errors.UserError(f'--compile for {topology.name} needs a compiler: pip install {packages.format(jax=jax.__version__)}')
  if kind == 'tpu':
    for name, value in TPU_ENVIRONMENT.items():
      os.environ.setdefault(name, value)
    one_chip = {'chips_per_host_bounds': (1, 1, 1)} if topology.count == 1 else {}
    name = f'{topology.family}:{"x".join(map(str, [*topology.sizes, 1][:3]))}' if topology.count == 1 else topology.name
    return list(topologies.get_topology_desc(platform='tpu', topology_name=name, **one_chip).devices)
  config = GPU_CONFIG.format(
    **GPUS[topology.family], bandwidth=int(device.memory_bandwidth or 0), memory=device.total_bytes, name=device.jax_name
  )
  gpus, hosts = topology.sizes
  return list(topologies.get_topology_desc(platform='cuda', target_config=config, topology=f'1x{hosts}x{gpus}').devices)


def _is_installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # of the package that it would be in
    return False


def stand_in(experiment: experiment_lib.Experiment, topology: devices.Topology) -> tuple[experiment_lib.Experiment, str]:
  """The experiment with what can be compiled without a GPU in the place of kernels that its training would take, and what is to be said.

  Like cuDNN's attention its stand-in keeps nothing that grows with the square of the length. A kernel that training wouldn't take is
  left to be passed over, or refused, as there.
  """
  c, model = experiment.training, experiment.model
  field, kernel, instead, note = STAND_INS['lstm' if build.carries(model) else 'transformer']
  if topology.device.kind != 'gpu' or getattr(model, field) not in ('auto', kernel):
    return experiment, ''
  with topology.target():
    mesh = sharding.abstract_mesh(experiment.sharding, topology.count)
    constrain = sharding.make_constrain(experiment.sharding, mesh)  # type: ignore[arg-type]  # it reads the shape alone
    planned = build.build(model, 1, c.sequence_length, constrain)  # the vocabulary makes no difference
    if build.obstacle(planned, kernel, c.sequence_length, c.mask_documents) != backend.ABSENT_GPU:
      return experiment, ''
  changed = copy.deepcopy(experiment)
  changed.model = dataclasses.replace(model, **{field: instead})  # type: ignore[arg-type]
  return changed, note


def check_host(topology: devices.Topology, peak: int) -> None:
  """Raises UserError where a cpu topology's step takes more than there is here: causal attention is traced a block of queries at a time.

  Args:
    topology: what to compile for.
    peak: bytes that the step is planned to take on each device.
  """
  has = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  if topology.device.kind == 'cpu' and peak > has:
    needs = f'{peak / 2**30:.4g} GiB on each device, and this machine, whose cores they are, has {has / 2**30:.4g}'
    raise errors.UserError(f'--compile for {topology.name}: the step takes {needs}')


def compile_step(experiment: experiment_lib.Experiment, vocab_size: int, topology: devices.Topology) -> Compiled:
  """Compiles the training step, as `trainer` would run it.

  Args:
    experiment: resolved.
    vocab_size: ids of the tokenizer.
    topology: what for.

  Raises:
    UserError: something doesn't fit the mesh, or the compiler isn't there.
    MachineFailed: the compiler says that memory doesn't do.
  """
  mesh = sharding.make_mesh(experiment.sharding, devices_of(topology))
  began = time.monotonic()
  with topology.target(), _told() as told:
    parts = program.Program(experiment, vocab_size, mesh)
    state = checkpoints.with_shardings(parts.abstract, parts.shardings)
    lowered = parts.step.lower(state, *abstract_inputs(parts))
    try:
      executable: Any = lowered.compile()
    except RuntimeError as error:
      if not errors.is_out_of_memory(error):
        raise
      raise errors.MachineFailed(f'XLA says {checkpoints.first_line(error)}') from error
  seconds = time.monotonic() - began
  if topology.device.kind == 'cpu':
    peak = memory.peak_bytes(executable)
  else:
    peak = executable.memory_analysis().peak_memory_in_bytes
  steps = experiment.training.steps_per_dispatch  # a loop, where there are several
  of_all = hlo.collectives(executable.as_text(), topology.count)
  said = {kind: hlo.Said(one.times // steps, one.bytes / steps) for kind, one in of_all.items()}
  return Compiled(int(peak or 0), seconds, said, sum(bool(REMATERIALIZATION.search(line)) for line in told))


def abstract_inputs(parts: program.Program) -> tuple[Any, ...]:
  """What the step takes beside the state: shapes, types and places of a batch."""
  c = parts.experiment.training
  places, lead = parts.batch_sharding, ()
  if c.steps_per_dispatch > 1:
    places, lead = sharding.stacked(places), (c.steps_per_dispatch,)  # type: ignore[assignment]

  def rows(dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*lead, c.batch_size, c.sequence_length), dtype, sharding=places)

  starts_BT: Any = rows(jnp.bool_) if c.windows == 'contiguous' or c.mask_documents else None
  batch = windows.Batch(rows(jnp.int32), rows(jnp.int32), rows(jnp.float32), starts_BT)  # type: ignore[arg-type]
  if not lead:
    return (batch,)
  return batch, jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(parts.mesh))


@contextlib.contextmanager
def _told() -> Iterator[list[str]]:
  """The lines that C++ code writes to stderr meanwhile, kept from the terminal."""
  lines: list[str] = []
  with tempfile.TemporaryFile(mode='w+', encoding='utf-8', errors='replace') as file:
    stderr = os.dup(2)
    os.dup2(file.fileno(), 2)
    failed = True
    try:
      yield lines
      failed = False
    finally:
      os.dup2(stderr, 2)
      os.close(stderr)
      file.seek(0)
      text = file.read()
      lines += text.splitlines()
      if failed:
        sys.stderr.write(text)  # why, perhaps
