"""Products of activations with kernels, in the form that XLA's CPU backend does fast.

Where few rows meet a large kernel it packs the kernel for each product. Of `by_columns`, (W^T x^T)^T with W^T as it lies in memory, it
packs the rows alone: on two cores of an AMD EPYC without AVX-512, jax 0.10.2, 16 rows times 768 x 3,072 run at 127 GFLOP/s for 33, 4 times
1,024 x 4,096 at 60 for 10. A kernel that lies as [in, out] has to be transposed for it, which takes as long as some ten products and,
while the loop runs, as much memory as the kernel: it is done before loops over time or over tokens.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import layout

from textgen_jax import backend, errors

MIN_SIDE = 256  # of a kernel; smaller ones are packed in no time: 16 rows times 128 x 512 run at 39 GFLOP/s for 38
MIN_ROWS = 2  # a model 256 wide draws one row at 724 tokens/s by the plain product, and at 559 by the other
SIDE_PER_ROW = 8  # at least, of the smaller side: 64 rows times 512 x 2,048 run at 112 GFLOP/s for 85, 128 at 114 for 118
MIN_TURNS = 16  # of a loop; 4 rows times 768 x 3,072 and back, eight times over: 8 turns took 221 ms for 199, 32 turns 366 for 778

Product = Callable[[jax.Array], jax.Array]  # of x_ND, [N, F]

OPERAND_DTYPES = ('auto', 'float32', 'bfloat16')

_turns: contextvars.ContextVar[int] = contextvars.ContextVar('turns', default=1)
_operands: contextvars.ContextVar[str] = contextvars.ContextVar('operands', default='float32')


def operand_dtype(name: str, platform: str, num_processes: int = 1) -> str:
  """'auto' is bfloat16 on CPUs that multiply it, where its products took half as long, and else float32; raises UserError.

  Args:
    name: one of OPERAND_DTYPES.
    platform: what the program is for: cpu, gpu or tpu.
    num_processes: several take float32 for 'auto': they run one program, and the others' CPUs aren't known.
  """
  if name not in OPERAND_DTYPES:
    raise errors.not_among('training.product_dtype', name, OPERAND_DTYPES)
  if name != 'auto':
    return name
  return 'bfloat16' if platform == 'cpu' and num_processes == 1 and backend.cpu_multiplies_bfloat16() else 'float32'


def operands(dtype: str) -> contextlib.AbstractContextManager[None]:
  """Within, float32 is rounded to this type before it is multiplied by kernels; sums and results are float32 still.

  The gradients' products do the same. What was jitted and called before doesn't see it.
  """
  return backend.within(_operands, dtype)


def loop_body(turns: int) -> contextlib.AbstractContextManager[None]:
  """What is traced within is the body of a loop of about so many turns, out of which XLA moves the transposing of the kernels.

  It can't where a kernel itself depends on the turn, as in a loop over layers. What was jitted and called before doesn't see it.
  """
  return backend.within(_turns, turns)


def is_faster_by_columns(rows: int, kernel: jax.Array) -> bool:
  """Rows are those of all devices; `rows` and the kernel's smaller side decide, and that nothing is rounded."""
  smaller = min(kernel.shape)
  fits = smaller >= MIN_SIDE and MIN_ROWS <= rows <= smaller // SIDE_PER_ROW
  # In bfloat16 128 products of 32 rows with 512 x 2,048, 16 on each of two devices, take 28 ms and 35 back, and 31 and 57 by columns.
  return fits and backend.name() == 'cpu' and not rounds()


def by_columns(x_ND: jax.Array, kernel_FD: jax.Array) -> jax.Array:
  """`x_ND @ kernel_FD.T`. Without the barrier XLA would make it that again."""
  return jax.lax.optimization_barrier(jnp.einsum('FD,ND->FN', kernel_FD, x_ND)).T


def dense(x_ND: jax.Array, kernel_DF: jax.Array) -> jax.Array:
  """`x_ND @ kernel_DF`."""
  if rounds():
    return _product(x_ND, kernel_DF, _operands.get(), False)
  return multiplier(kernel_DF, len(x_ND))(x_ND)


def dense_time_major(x_TBD: jax.Array, kernel_DF: jax.Array) -> jax.Array:
  """`x_TBD @ kernel_DF`, [T, B, F]."""
  x = _rows(x_TBD)
  y = dense(x, kernel_DF) if x.ndim == 2 else _product(x, kernel_DF, _operands.get(), False)
  return y.reshape(*x_TBD.shape[:-1], -1)


def dense_transposed(x_ND: jax.Array, kernel_FD: jax.Array) -> jax.Array:
  """`x_ND @ kernel_FD.T`."""
  if rounds():
    return _product(x_ND, kernel_FD, _operands.get(), True)
  return transposed_multiplier(kernel_FD, len(x_ND))(x_ND)


def multiplier(kernel_DF: jax.Array, rows: int, turns: int = 1) -> Product:
  """Multiplies so many rows by the kernel, in each of the `turns` of a loop around the call.

  Where it rounds it isn't to be differentiated: the gradients would be rounded too.
  """
  kernel_DF = operand(kernel_DF)
  if max(turns, _turns.get()) < MIN_TURNS or not is_faster_by_columns(rows, kernel_DF):
    dtype = _operands.get()
    return lambda x_ND: _product(x_ND, kernel_DF, dtype, False)
  kernel_FD = jax.lax.optimization_barrier(kernel_DF.T)  # else XLA would multiply by the kernel as it was
  return lambda x_ND: by_columns(x_ND, kernel_FD)


def transposed_multiplier(kernel_FD: jax.Array, rows: int) -> Product:
  """Multiplies by the transpose of the kernel, which lies as it should; where it rounds, as `multiplier`."""
  kernel_FD = operand(kernel_FD)
  if is_faster_by_columns(rows, kernel_FD):
    return lambda x_ND: by_columns(x_ND, kernel_FD)
  dtype = _operands.get()
  if dtype == 'float32':
    kernel_DF = kernel_FD.T
    return lambda x_ND: x_ND @ kernel_DF
  return lambda x_ND: _product(x_ND, kernel_FD, dtype, True)


def rounds() -> bool:
  """Whether what is traced here rounds float32 for products."""
  return _operands.get() != 'float32'


def kernel_gradient(x_TBD: jax.Array, dy_TBF: jax.Array) -> jax.Array:
  """The gradient of a kernel that `x_TBD` was multiplied by, [D, F], summed in float32; it isn't to be differentiated itself."""
  return _kernel_gradient(operand(_rows(x_TBD)), operand(_rows(dy_TBF)), jnp.float32).astype(dy_TBF.dtype)


def _rows(x_TBD: jax.Array) -> jax.Array:
  """Flattened, as it is multiplied fastest, where there is one time or one device: several would each gather the rows of all.

  XLA keeps rows apart only if nothing stands before them.
  """
  return x_TBD if backend.device_count() > 1 and len(x_TBD) > 1 else x_TBD.reshape(-1, x_TBD.shape[-1])


def _kernel_gradient(x: jax.Array, dy: jax.Array, sums: Any) -> jax.Array:
  if x.ndim > 2:
    rows = tuple(range(x.ndim - 1))
    return _sum_over(rows, rows, x, dy, sums)
  x_DN = x.T
  if x_DN.dtype != sums and backend.name() == 'cpu':  # bfloat16 is multiplied fast where what stands on the left lies in rows
    x_DN = layout.with_layout_constraint(x_DN, layout.Layout(major_to_minor=(0, 1)))
  return _multiply(x_DN, dy, sums)


def _multiply(a: jax.Array, b: jax.Array, sums: Any, transposed: bool = False) -> jax.Array:
  """`a @ b`, or `a @ b.T`, summed in the type `sums`."""
  if a.dtype == sums:
    return a @ (b.T if transposed else b)
  return _sum_over((a.ndim - 1,), (1 if transposed else 0,), a, b, sums)


def _sum_over(axes_of_a: tuple[int, ...], axes_of_b: tuple[int, ...], a: jax.Array, b: jax.Array, sums: Any) -> jax.Array:
  """The product of `a` and `b`, summed over these axes in the type `sums`."""
  product = jax.lax.dot_general(a, b, ((axes_of_a, axes_of_b), ((), ())), preferred_element_type=sums)
  if a.dtype == sums or backend.name() != 'cpu':
    return product
  # As one operation: of a transpose and a product XLA's CPU backend multiplies float32, and where it moves a transpose from the product to
  # what is multiplied it can't take bfloat16 at all.
  return jax.lax.optimization_barrier(product)


def operand(x: jax.Array) -> jax.Array:
  """`x`, rounded where it is float32 and `operands` say so."""
  return _rounded(x, _operands.get()) if x.dtype == jnp.float32 else x


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
  """Written out: XLA would round one number at a time within the product."""
  return x if x.dtype == dtype else jax.lax.optimization_barrier(x.astype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: jax.Array, kernel: jax.Array, dtype: str, transposed: bool) -> jax.Array:
  """The product of what is rounded to `dtype`; its kernel's gradient is made in the kernel's own layout.

  JAX makes it as [F, D] and transposes that; XLA's CPU backend then walks across memory in every pass of the optimizer.

  Args:
    x: [..., D]; its leading axes stay apart, so that each may be split.
    kernel: [D, F]; or, `transposed`, [F, D].
    dtype: of the operands.
    transposed: whether the kernel's transpose is multiplied by.
  """
  return _product_forward(x, kernel, dtype, transposed)[0]


def _product_forward(x: jax.Array, kernel: jax.Array, dtype: str, transposed: bool) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  with operands(dtype):
    saved = operand(x), operand(kernel)
  return _multiply(*saved, x.dtype, transposed), saved


def _product_backward(dtype: str, transposed: bool, saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
  x, kernel = saved
  sums, dy = dy.dtype, _rounded(dy, x.dtype)
  dx = _multiply(dy, kernel, sums, not transposed)
  return dx, _kernel_gradient(dy, x, sums) if transposed else _kernel_gradient(x, dy, sums)


_product.defvjp(_product_forward, _product_backward)
