"""The kind of device that programs are made for: the one that JAX runs on, or one that isn't here."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar('target', default=None)


def name() -> str:
  """cpu, gpu or tpu; what is chosen by it is chosen while a program is traced."""
  return _target.get() or jax.default_backend()


def is_here() -> bool:
  """Whether programs are made for the devices of this process."""
  return _target.get() is None


def nvidia_obstacle() -> str:
  """Why what needs an NVIDIA GPU of compute capability 8.0 or more, to be compiled and to run, can't be; empty where it can."""
  if name() != 'gpu':
    return f'it needs an NVIDIA GPU, and JAX runs on {name()}'
  if not is_here():
    return 'it can only be compiled where the GPU is'
  device = jax.local_devices()[0]
  if 'cuda' not in device.client.platform_version or float(device.compute_capability) < 8:
    return f'it needs an NVIDIA GPU of compute capability 8.0 or more, and this is {device.device_kind}'
  return ''


@contextlib.contextmanager
def target(kind: str) -> Iterator[None]:
  """What is traced within is for devices of this kind, whatever JAX runs on."""
  token = _target.set(kind)
  try:
    yield
  finally:
    _target.reset(token)
