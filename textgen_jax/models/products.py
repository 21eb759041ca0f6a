"""Products of activations with kernels, in the form that XLA's CPU backend does fast.

Where few rows meet a large kernel it packs the kernel for each product. Of `by_columns`, (W^T x^T)^T with W^T as it lies in memory, it
packs the rows alone: on two cores of an AMD EPYC without AVX-512, jax 0.10.2, 16 rows times 768 x 3,072 run at 127 GFLOP/s for 33, 4 times
1,024 x 4,096 at 60 for 10. A kernel that lies as [in, out] has to be transposed for it, which takes as long as some ten products and,
while the loop runs, as much memory as the kernel: it is done before loops over time or over tokens.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from textgen_jax import backend

MIN_SIDE = 256  # of a kernel; smaller ones are packed in no time: 16 rows times 128 x 512 run at 39 GFLOP/s for 38
MIN_ROWS = 2  # a model 256 wide draws one row at 724 tokens/s by the plain product, and at 559 by the other
SIDE_PER_ROW = 8  # at least, of the smaller side: 64 rows times 512 x 2,048 run at 112 GFLOP/s for 85, 128 at 114 for 118
MIN_TURNS = 16  # of a loop; 4 rows times 768 x 3,072 and back, eight times over: 8 turns took 221 ms for 199, 32 turns 366 for 778

Product = Callable[[jax.Array], jax.Array]  # of x_ND, [N, F]

_turns: contextvars.ContextVar[int] = contextvars.ContextVar('turns', default=1)


@contextlib.contextmanager
def loop_body(turns: int) -> Iterator[None]:
  """What is traced within is the body of a loop of about so many turns, out of which XLA moves the transposing of the kernels.

  It can't where a kernel itself depends on the turn, as in a loop over layers. What was jitted and called before doesn't see it.
  """
  token = _turns.set(turns)
  try:
    yield
  finally:
    _turns.reset(token)


def is_faster_by_columns(rows: int, kernel: jax.Array) -> bool:
  """Rows are those of all devices; `rows` and the kernel's smaller side decide."""
  smaller = min(kernel.shape)
  return backend.name() == 'cpu' and smaller >= MIN_SIDE and MIN_ROWS <= rows <= smaller // SIDE_PER_ROW


def by_columns(x_ND: jax.Array, kernel_FD: jax.Array) -> jax.Array:
  """`x_ND @ kernel_FD.T`. Without the barrier XLA would make it that again."""
  return jax.lax.optimization_barrier(jnp.einsum('FD,ND->FN', kernel_FD, x_ND)).T


def dense(x_ND: jax.Array, kernel_DF: jax.Array) -> jax.Array:
  """`x_ND @ kernel_DF`."""
  return multiplier(kernel_DF, len(x_ND))(x_ND)


def dense_transposed(x_ND: jax.Array, kernel_FD: jax.Array) -> jax.Array:
  """`x_ND @ kernel_FD.T`."""
  return transposed_multiplier(kernel_FD, len(x_ND))(x_ND)


def multiplier(kernel_DF: jax.Array, rows: int, turns: int = 1) -> Product:
  """Multiplies so many rows by the kernel, in each of the `turns` of a loop around the call."""
  if max(turns, _turns.get()) < MIN_TURNS or not is_faster_by_columns(rows, kernel_DF):
    return lambda x_ND: _product(x_ND, kernel_DF)
  kernel_FD = jax.lax.optimization_barrier(kernel_DF.T)  # else XLA would multiply by the kernel as it was
  return lambda x_ND: by_columns(x_ND, kernel_FD)


def transposed_multiplier(kernel_FD: jax.Array, rows: int) -> Product:
  """Multiplies by the transpose of the kernel, which lies as it should."""
  if is_faster_by_columns(rows, kernel_FD):
    return lambda x_ND: by_columns(x_ND, kernel_FD)
  kernel_DF = kernel_FD.T
  return lambda x_ND: x_ND @ kernel_DF


@jax.custom_vjp
def _product(x_ND: jax.Array, kernel_DF: jax.Array) -> jax.Array:
  """The product, whose kernel's gradient is made in the kernel's own layout.

  JAX makes it as [F, D] and transposes that; XLA's CPU backend then walks across memory in every pass of the optimizer.
  """
  return x_ND @ kernel_DF


def _product_forward(x_ND: jax.Array, kernel_DF: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return x_ND @ kernel_DF, (x_ND, kernel_DF)


def _product_backward(saved: tuple[jax.Array, jax.Array], dy_NF: jax.Array) -> tuple[jax.Array, jax.Array]:
  x_ND, kernel_DF = saved
  return dy_NF @ kernel_DF.T, x_ND.T @ dy_NF


_product.defvjp(_product_forward, _product_backward)
