"""Products of activations with kernels, as XLA's CPU backend is fast in them.

Where few rows meet a large kernel it packs the kernel for each product. Of (W^T x^T)^T, with W^T written out as [out, in], it packs the
rows alone: 16 rows times 768 x 3,072 run at 127 GFLOP/s for 33, 4 times 1,024 x 4,096 at 60 for 10. Writing W^T out takes as long as
several products, so that it pays where it is done once for many: in a loop over time, or over tokens.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from textgen_jax import backend

NARROWEST = 256  # of a kernel's sides; smaller ones are packed in no time: 16 rows times 128 x 512 run at 39 GFLOP/s for 38
FEWEST_ROWS = 2  # one is no product of matrices: a model 256 wide draws 724 tokens/s by the plain one and 559 by the other
FEW = 4  # times the rows are at most the kernel's smaller side: 64 rows times 512 x 2,048 run at 112 GFLOP/s for 85, 128 at 114 for 118

_loops: contextvars.ContextVar[bool] = contextvars.ContextVar('loops', default=False)


@contextlib.contextmanager
def loop_body() -> Iterator[None]:
  """What is traced within is a loop's body: what it makes of parameters alone, such as W^T, XLA makes once, before the loop."""
  token = _loops.set(True)
  try:
    yield
  finally:
    _loops.reset(token)


def in_loop() -> bool:
  """Whether a loop's body is being traced."""
  return _loops.get()


def are_few(rows: int, kernel: jax.Array) -> bool:
  """Whether `by_columns` is the faster."""
  smaller = min(kernel.shape)
  return backend.name() == 'cpu' and smaller >= NARROWEST and rows >= FEWEST_ROWS and FEW * rows <= smaller


def turned(kernel_KN: jax.Array) -> jax.Array:
  """The kernel as [N, K], written out: without the barrier XLA would multiply with it as it was."""
  return jax.lax.optimization_barrier(kernel_KN.T)


def by_columns(x_BK: jax.Array, kernel_NK: jax.Array) -> jax.Array:
  """`x_BK @ kernel_NK.T`, [B, N]. The barrier is for the same reason."""
  return jax.lax.optimization_barrier(jnp.einsum('NK,BK->NB', kernel_NK, x_BK)).T


def dense(x_BK: jax.Array, kernel_KN: jax.Array) -> jax.Array:
  """`x_BK @ kernel_KN`."""
  return by_columns(x_BK, turned(kernel_KN)) if in_loop() and are_few(len(x_BK), kernel_KN) else _product(x_BK, kernel_KN)


@jax.custom_vjp
def _product(x_BK: jax.Array, kernel_KN: jax.Array) -> jax.Array:
  """The product, whose kernel's gradient is made in the kernel's own layout.

  JAX makes it as [N, K] and transposes that; XLA's CPU backend then walks across memory in every pass of the optimizer.
  """
  return x_BK @ kernel_KN


def _forward(x_BK: jax.Array, kernel_KN: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return x_BK @ kernel_KN, (x_BK, kernel_KN)


def _backward(saved: tuple[jax.Array, jax.Array], slope_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
  x_BK, kernel_KN = saved
  return slope_BN @ kernel_KN.T, x_BK.T @ slope_BN


_product.defvjp(_forward, _backward)
