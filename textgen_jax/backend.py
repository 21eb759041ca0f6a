"""The devices that programs are made for: those that JAX runs on, or some that aren't here."""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax

OLDEST_GPU = 8.0  # compute capability that kernels need
ABSENT_GPU = 'it can only be compiled where the GPU is'  # the last of a kernel's obstacles: but for it the kernel would do


@dataclasses.dataclass(frozen=True)
class Target:
  """Devices that aren't here."""

  kind: str
  count: int
  compute_capability: float  # of NVIDIA GPUs


_target: contextvars.ContextVar[Target | None] = contextvars.ContextVar('target', default=None)


def name() -> str:
  """cpu, gpu or tpu; what is chosen by it is chosen while a program is traced."""
  target = _target.get()
  return target.kind if target else jax.default_backend()


def device_count() -> int:
  """How many there are; an unconstrained model may run over all of them."""
  target = _target.get()
  return target.count if target else jax.device_count()


def compute_capability() -> float:
  """Of the GPUs, which are NVIDIA's."""
  target = _target.get()
  return target.compute_capability if target else float(jax.local_devices()[0].compute_capability)


@functools.cache
def cpu_multiplies_bfloat16(path: str = '/proc/cpuinfo') -> bool:
  """Whether this machine's CPU has instructions for it: AVX-512's, or AMX's. What can't be found out is no."""
  try:
    with open(path) as file:
      flags = next((line.split() for line in file if line.startswith('flags')), [])
  except OSError:
    return False
  return not {'avx512_bf16', 'amx_bf16'}.isdisjoint(flags)


def is_here() -> bool:
  """Whether programs are made for the devices of this process."""
  return _target.get() is None


def nvidia_obstacle() -> str:
  """Why what needs an NVIDIA GPU of compute capability 8.0 or more can't run; empty where it can. That it isn't here is ABSENT_GPU."""
  if name() != 'gpu':
    return f'it needs an NVIDIA GPU, and {_where()}'
  if not is_here():
    return '' if compute_capability() >= OLDEST_GPU else f'it needs compute capability {OLDEST_GPU}, and the GPU has {compute_capability()}'
  device = jax.local_devices()[0]
  if 'cuda' not in device.client.platform_version or compute_capability() < OLDEST_GPU:
    return f'it needs an NVIDIA GPU of compute capability {OLDEST_GPU} or more, and this is {device.device_kind}'
  return ''


def tpu_obstacle() -> str:
  """The same of what needs a TPU."""
  return '' if name() == 'tpu' else f'it needs a TPU, and {_where()}'


def _where() -> str:
  return f'JAX runs on {name()}' if is_here() else f'the topology is of {name()}s'


def target(kind: str, count: int = 1, compute_capability: float = OLDEST_GPU) -> contextlib.AbstractContextManager[None]:
  """What is traced within is for so many devices of this kind, whatever JAX runs on."""
  return within(_target, Target(kind, count, compute_capability))


@contextlib.contextmanager
def within(variable: contextvars.ContextVar[Any], value: Any) -> Iterator[None]:
  """What is traced within sees the variable at this value."""
  token = variable.set(value)
  try:
    yield
  finally:
    variable.reset(token)
