"""An LSTM layer's loop on an NVIDIA GPU: at each time one product, and one kernel for all the rest.

XLA makes seven small kernels of a step's arithmetic and copies, which together take longer than the product.
Gates, carry and starts are as in `recurrence`; the results equal `recurrence.recur`'s up to rounding.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from textgen_jax import axes, backend
from textgen_jax.models import base

Carry = tuple[jax.Array, jax.Array]  # hidden_BD and cell_BD, in float32

KERNELS = ('auto', 'plain', 'triton')  # what `model.recurrence_kernel` may be

TILE, MOST_COLUMNS = 512, 128  # elements of the state that one program of a kernel works on, and how many of a row
FEWEST_COLUMNS = 8
STEPS_A_LAUNCH = 16  # as one CUDA graph
WARPS = 4


def choose(kernel: str, gates_shape: tuple[int, ...], valid_TB: Any, constrain: base.Constrain) -> str:
  """plain or triton, for one call: the one that is asked for or, where that can't do it, plain."""
  return 'plain' if kernel == 'plain' or obstacle(gates_shape, valid_TB, constrain) else 'triton'


def obstacle(gates_shape: tuple[int, ...], valid_TB: Any, constrain: base.Constrain) -> str:
  """Why the kernel can't do a call; empty where it can."""
  if backend.name() != 'gpu':
    return f'it needs an NVIDIA GPU, and JAX runs on {backend.name()}'
  if backend.is_here() and 'cuda' not in jax.local_devices()[0].client.platform_version:
    return f'it needs an NVIDIA GPU, and this is {jax.local_devices()[0].device_kind}'
  if valid_TB is not None:
    return 'it has no padding'
  _, batch, width = gates_shape
  ways = getattr(constrain, 'ways', (lambda name: 1) if jax.device_count() == 1 or not backend.is_here() else None)
  if ways is None or batch % ways(axes.BATCH):
    return 'on several devices it needs rows that are split evenly over a mesh'
  if tile(batch, width // 4)[1] < FEWEST_COLUMNS:
    return f'model.dim={width // 4} is not divisible by {FEWEST_COLUMNS}'
  return ''


def apply(
  gates_TBG: jax.Array, bias_G: jax.Array, kernel_DG: jax.Array, carry: Carry, keep_BD: Any, starts_TB: Any, constrain: base.Constrain,
  interpret: bool = False,
) -> tuple[jax.Array, Carry]:  # fmt: skip
  """`recur`, each device on its own rows."""

  def function(*args: Any) -> tuple[jax.Array, jax.Array]:
    hidden_TBD, last = recur(*args, interpret)
    return hidden_TBD, jnp.stack(last)

  split: Callable[..., Any] | None = getattr(constrain, 'split', None)
  if split is not None:
    rows, later_rows = (axes.BATCH,), (None, axes.BATCH)
    function = split(function, (later_rows, (), (), rows, rows, later_rows), later_rows)
  hidden_TBD, last = function(gates_TBG, bias_G, kernel_DG, carry, keep_BD, starts_TB)
  return hidden_TBD, (last[0], last[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def recur(
  gates_TBG: jax.Array, bias_G: jax.Array, kernel_DG: jax.Array, carry: Carry, keep_BD: Any, starts_TB: Any, interpret: bool = False
) -> tuple[jax.Array, Carry]:
  """`recurrence.recur` where all tokens are valid; `interpret` is Pallas's own switch: slowly, and on any backend."""
  return _forward(gates_TBG, bias_G, kernel_DG, carry, keep_BD, starts_TB, interpret)[0]


def _forward(
  gates_TBG: jax.Array, bias_G: jax.Array, kernel_DG: jax.Array, carry: Carry, keep_BD: Any, starts_TB: Any, interpret: bool
) -> tuple[tuple[jax.Array, Carry], Any]:
  time, batch, width = gates_TBG.shape
  dim, dtype = width // 4, kernel_DG.dtype
  options = _options(keep_BD, starts_TB)
  # The state after each time; what was before the first comes first.
  cells_SBD = jnp.zeros((time + 1, batch, dim), jnp.float32).at[0].set(carry[1])
  hidden_TBD = jnp.zeros((time, batch, dim), dtype)
  seen_BD = (carry[0] if keep_BD is None else carry[0] * keep_BD).astype(dtype)
  advance = _kernel(_advance, options, batch, dim, interpret)

  def step(state: Any, _: None) -> tuple[Any, None]:
    time_1, acts_TBG, hidden_TBD, cells_SBD, seen_BD, _ = state
    product_BG = jnp.dot(seen_BD, kernel_DG, preferred_element_type=jnp.float32)
    new = [_like(seen_BD), _like(carry[0])]
    return tuple(advance([time_1, acts_TBG, hidden_TBD, cells_SBD], [product_BG, bias_G], new)), None

  state = jnp.zeros((1,), jnp.int32), gates_TBG.astype(jnp.float32), hidden_TBD, cells_SBD, seen_BD, carry[0]
  (_, acts_TBG, hidden_TBD, cells_SBD, _, last_BD), _ = jax.lax.scan(step, state, None, time, unroll=STEPS_A_LAUNCH)
  residuals = acts_TBG, hidden_TBD, cells_SBD, carry[0], kernel_DG, keep_BD, starts_TB
  return (hidden_TBD, (last_BD, cells_SBD[-1])), residuals


def _backward(interpret: bool, residuals: Any, slopes: tuple[jax.Array, Carry]) -> Any:
  acts_TBG, hidden_TBD, cells_SBD, first_hidden_BD, kernel_DG, keep_BD, starts_TB = residuals
  slope_TBD, (last_hidden_slope_BD, last_cell_slope_BD) = slopes
  time, batch, width = acts_TBG.shape
  dim, dtype = width // 4, kernel_DG.dtype
  retreat = _kernel(_retreat, _options(keep_BD, starts_TB), batch, dim, interpret)
  slope_TBD = slope_TBD.at[-1].add(last_hidden_slope_BD.astype(slope_TBD.dtype))
  kernel_GD = kernel_DG.T

  def step(state: Any, _: None) -> tuple[Any, None]:
    time_1, slopes_TBG, seen_slope_BD, cell_slope_BD = state
    new = [jax.ShapeDtypeStruct((batch, width), dtype), _like(cell_slope_BD)]
    time_1, slopes_TBG, slope_BG, cell_slope_BD = retreat(
      [time_1, slopes_TBG], [seen_slope_BD, cell_slope_BD, slope_TBD, acts_TBG, cells_SBD], new
    )
    return (time_1, slopes_TBG, jnp.dot(slope_BG, kernel_GD, preferred_element_type=jnp.float32), cell_slope_BD), None

  nothing_BD = jnp.zeros((batch, dim), jnp.float32)
  state = jnp.full((1,), time - 1, jnp.int32), jnp.zeros((time, batch, width), dtype), nothing_BD, last_cell_slope_BD
  (_, slopes_TBG, hidden_slope_BD, cell_slope_BD), _ = jax.lax.scan(step, state, None, time, unroll=STEPS_A_LAUNCH)

  seen_TBD = jnp.concatenate([first_hidden_BD[None].astype(dtype), hidden_TBD[:-1]])
  if keep_BD is not None:
    seen_TBD = (seen_TBD * keep_BD).astype(dtype)
    hidden_slope_BD = hidden_slope_BD * keep_BD
  if starts_TB is not None:
    seen_TBD = jnp.where(starts_TB[..., None], 0, seen_TBD)
    hidden_slope_BD, cell_slope_BD = (jnp.where(starts_TB[0, :, None], 0, x_BD) for x_BD in (hidden_slope_BD, cell_slope_BD))
  kernel_slope_DG = jnp.einsum('TBD,TBG->DG', seen_TBD, slopes_TBG, preferred_element_type=jnp.float32).astype(dtype)
  return slopes_TBG, slopes_TBG.sum((0, 1), jnp.float32), kernel_slope_DG, (hidden_slope_BD, cell_slope_BD), None, None


recur.defvjp(_forward, _backward)


def _options(keep_BD: Any, starts_TB: Any) -> dict[str, jax.Array]:
  """What a kernel may be given beside the rest; after the last time nothing starts."""
  starts_SB = None if starts_TB is None else jnp.pad(starts_TB.astype(jnp.int32), ((0, 1), (0, 0)))
  return {name: x for name, x in (('starts', starts_SB), ('keep', keep_BD)) if x is not None}


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def tile(batch: int, dim: int) -> tuple[int, int]:
  """Rows and columns of the state that a program works on: powers of two, as Triton wants, that divide it."""
  columns = math.gcd(dim, MOST_COLUMNS)
  return math.gcd(batch, TILE // columns), columns


def _kernel(body: Callable[..., None], options: dict[str, jax.Array], batch: int, dim: int, interpret: bool) -> Callable[..., Any]:
  """A function of arrays that the kernel changes in place, others that it reads, and shapes of new ones; gives the first and the last."""
  from jax.experimental import pallas
  from jax.experimental.pallas import triton

  rows, columns = tile(batch, dim)

  def call(changed: Sequence[jax.Array], read: Sequence[jax.Array], new: Sequence[jax.ShapeDtypeStruct]) -> Any:
    def run(*refs: Any) -> None:
      inputs, outputs = refs[: -len(changed) - len(new)], refs[-len(changed) - len(new) :]
      named = dict(zip(options, inputs[len(changed) + len(read) :], strict=True))
      place = pallas.ds(pallas.program_id(0) * rows, rows), pallas.program_id(1) * columns, columns
      body(place, dim, named, *inputs[: len(changed) + len(read)], *outputs)

    return pallas.pallas_call(
      run,
      out_shape=[*map(_like, changed), *new],
      grid=(batch // rows, dim // columns),
      input_output_aliases={i: i for i in range(len(changed))},
      compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
      interpret=interpret,
      name=f'lstm{body.__name__}',
    )(*changed, *read, *options.values())

  return call


# In the kernels' bodies `place` is a program's rows, its first column and how many.


def _advance(
  place: Any, dim: int, options: Any, time_ref: Any, acts_ref: Any, hidden_ref: Any, cells_ref: Any, product_ref: Any, bias_ref: Any,
  new_time_ref: Any, new_acts_ref: Any, new_hidden_ref: Any, new_cells_ref: Any, seen_ref: Any, last_ref: Any,
) -> None:  # fmt: skip
  """What follows the product: gates, cell and hidden state of one time, each written to where all times' are."""
  del hidden_ref
  t = time_ref[0]
  rows, at, parts = _parts(place, dim)
  acts = []
  for n, part in enumerate(parts):
    product = product_ref[rows, part]
    if 'starts' in options:
      product = _unless(options['starts'][t, rows], product)
    total = acts_ref[t, rows, part] + bias_ref[part][None] + product
    acts.append(jnp.tanh(total) if n == 2 else jax.nn.sigmoid(total))
    new_acts_ref[t, rows, part] = acts[-1]
  i, f, g, o = acts
  before = cells_ref[t, rows, at]
  if 'starts' in options:
    before = _unless(options['starts'][t, rows], before)
  cell = f * before + i * g
  hidden = o * jnp.tanh(cell)
  new_cells_ref[t + 1, rows, at] = cell
  last_ref[rows, at] = hidden
  new_hidden_ref[t, rows, at] = hidden.astype(new_hidden_ref.dtype)
  seen = hidden * options['keep'][rows, at] if 'keep' in options else hidden
  seen_ref[rows, at] = seen.astype(seen_ref.dtype)
  new_time_ref[0] = t + 1


def _retreat(
  place: Any, dim: int, options: Any, time_ref: Any, slopes_ref: Any, seen_slope_ref: Any, cell_slope_ref: Any, slope_ref: Any,
  acts_ref: Any, cells_ref: Any, new_time_ref: Any, new_slopes_ref: Any, gates_slope_ref: Any, new_cell_slope_ref: Any,
) -> None:  # fmt: skip
  """The gradients of one time's gates and of the cell before, from those of the state after it; see `recurrence`."""
  del slopes_ref
  t = time_ref[0]
  rows, at, parts = _parts(place, dim)
  i, f, g, o = (acts_ref[t, rows, part] for part in parts)
  seen_slope, cell_slope, before = seen_slope_ref[rows, at], cell_slope_ref[rows, at], cells_ref[t, rows, at]
  if 'keep' in options:
    seen_slope = seen_slope * options['keep'][rows, at]
  if 'starts' in options:
    seen_slope, cell_slope = (_unless(options['starts'][t + 1, rows], x) for x in (seen_slope, cell_slope))
    before = _unless(options['starts'][t, rows], before)
  hidden_slope = seen_slope + slope_ref[t, rows, at].astype(jnp.float32)
  tanh_cell = jnp.tanh(cells_ref[t + 1, rows, at])
  cell_slope = cell_slope + hidden_slope * o * (1 - tanh_cell * tanh_cell)
  gate_slopes = (
    cell_slope * g * i * (1 - i),
    cell_slope * before * f * (1 - f),
    cell_slope * i * (1 - g * g),
    hidden_slope * tanh_cell * o * (1 - o),
  )
  for part, gate_slope in zip(parts, gate_slopes, strict=True):
    new_slopes_ref[t, rows, part] = gate_slope.astype(new_slopes_ref.dtype)
    gates_slope_ref[rows, part] = gate_slope.astype(gates_slope_ref.dtype)
  new_cell_slope_ref[rows, at] = cell_slope * f
  new_time_ref[0] = t - 1


def _parts(place: Any, dim: int) -> tuple[Any, Any, list[Any]]:
  """The rows, the columns of the state, and those of each gate."""
  from jax.experimental import pallas

  rows, first, columns = place
  return rows, pallas.ds(first, columns), [pallas.ds(first + n * dim, columns) for n in range(4)]


def _unless(starts_R: jax.Array, x: jax.Array) -> jax.Array:
  return jnp.where(starts_R[:, None] != 0, jnp.zeros_like(x), x)
