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


@contextlib.contextmanager
def target(kind: str) -> Iterator[None]:
  """What is traced within is for devices of this kind, whatever JAX runs on."""
  token = _target.set(kind)
  try:
    yield
  finally:
    _target.reset(token)
