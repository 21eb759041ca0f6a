"""An LSTM layer's loop on an NVIDIA GPU: at each time one product, and one kernel for all the rest.

Of the same step XLA makes the product and seven kernels. Gates, carry and starts are as in `recurrence`, and the results too, up to
rounding.
"""

import functools
import math
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from textgen_jax import axes, backend
from textgen_jax.models import base, products, recurrence
from textgen_jax.models.recurrence import Carry

KERNELS = ('auto', 'plain', 'triton')  # what `model.recurrence_kernel` may be

# On an H200, two layers 1,024 wide: tiles of 256, 512 and 1,024 elements 9.01, 8.97 and 9.62 ms a step; 8, 16 and 32 steps a launch 8.97,
# 8.92 and 8.87.
TILE, MOST_COLUMNS = 512, 128  # elements of the state that one program of a kernel works on, and how many of a row
FEWEST_COLUMNS = 8  # narrower reads would each fetch a sector of memory for a part of it
STEPS_A_LAUNCH = 16  # as one CUDA graph
WARPS = 4  # of 32 threads: four elements each


def choose(kernel: str, gates_shape: tuple[int, ...], valid_TB: Any, constrain: base.Constrain) -> str:
  """plain or triton, for one call: the one that is asked for or, where that can't do it, plain."""
  return 'plain' if kernel == 'plain' or obstacle(gates_shape, valid_TB, constrain) else 'triton'


def obstacle(gates_shape: tuple[int, ...], valid_TB: Any, constrain: base.Constrain) -> str:
  """Why the kernel can't do a call; empty where it can.

  Args:
    gates_shape: [T, B, 4 D].
    valid_TB: None, or which tokens are.
    constrain: the model's.
  """
  reason = backend.nvidia_obstacle()
  if reason:
    return reason
  try:
    from jax.experimental.pallas import triton  # noqa: F401
  except ImportError:  # JAX says that it will go
    return f'jax {jax.__version__} has no Triton'
  time, batch, width = gates_shape
  if valid_TB is not None:
    return 'it has no padding'
  if time < STEPS_A_LAUNCH:
    return f'a row has {time} tokens, and it needs {STEPS_A_LAUNCH}'
  ways = getattr(constrain, 'ways', (lambda name: 1) if backend.device_count() == 1 else None)
  if ways is None or batch % ways(axes.BATCH):
    return 'on several devices it needs rows that are split evenly over a mesh'
  if tile(batch, width // 4)[1] < FEWEST_COLUMNS:
    return f'model.dim={width // 4} is not divisible by {FEWEST_COLUMNS}'
  return '' if backend.is_here() else backend.ABSENT_GPU


def apply(
  gates_TBG: jax.Array, bias_G: jax.Array, kernel_DG: jax.Array, carry: Carry, keep_BD: Any, starts_TB: Any, constrain: base.Constrain,
  interpret: bool = False,
) -> tuple[jax.Array, Carry]:  # fmt: skip
  """`recur`, each device on its own rows; arguments are its, and the model's constrain."""

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
  """The hidden states after each time, in the kernel's type, and the last carry: `recurrence.recur` of valid tokens.

  Args:
    gates_TBG: the input's part of the gates, without the bias, in the kernel's type.
    bias_G: in float32.
    keep_BD: what the hidden state is multiplied by on its way to the gates; None: by nothing.
    starts_TB: bool. None: none starts.
    interpret: Pallas's own switch: slowly, and on any backend.
  """
  return _forward(gates_TBG, bias_G, kernel_DG, carry, keep_BD, starts_TB, interpret)[0]


def _forward(
  gates_TBG: jax.Array, bias_G: jax.Array, kernel_DG: jax.Array, carry: Carry, keep_BD: Any, starts_TB: Any, interpret: bool
) -> tuple[tuple[jax.Array, Carry], Any]:
  time, batch, width = gates_TBG.shape
  dim, dtype = width // 4, kernel_DG.dtype
  masks = _masks(keep_BD, starts_TB)
  seen_BD = (carry[0] if keep_BD is None else carry[0] * keep_BD).astype(dtype)
  new = {'time': _like(_one(0)), 'seen': _like(seen_BD), 'last': _like(carry[0])}

  def step(state: Any, _: None) -> tuple[Any, None]:
    time_1, seen_BD, _, changed = state
    read = {'time': time_1, 'product': jnp.dot(seen_BD, kernel_DG, preferred_element_type=jnp.float32), 'bias': bias_G, **masks}
    changed, made = _call(_advance, batch, dim, changed, read, new, interpret)
    return (made['time'], made['seen'], made['last'], changed), None

  changed = {
    'acts': gates_TBG.astype(jnp.float32),
    'hidden': jnp.zeros((time, batch, dim), dtype),
    'cells': jnp.zeros((time + 1, batch, dim), jnp.float32).at[0].set(carry[1]),  # before the first time, and after each
  }
  (_, _, last_BD, changed), _ = jax.lax.scan(step, (_one(0), seen_BD, carry[0], changed), None, time, unroll=STEPS_A_LAUNCH)
  residuals = changed, carry[0], kernel_DG, keep_BD, starts_TB
  return (changed['hidden'], (last_BD, changed['cells'][-1])), residuals


def _backward(interpret: bool, residuals: Any, slopes: tuple[jax.Array, Carry]) -> Any:
  passed, first_hidden_BD, kernel_DG, keep_BD, starts_TB = residuals
  slope_TBD, (last_hidden_slope_BD, last_cell_slope_BD) = slopes
  time, batch, width = passed['acts'].shape
  dim, dtype = width // 4, kernel_DG.dtype
  masks, kernel_GD = _masks(keep_BD, starts_TB), kernel_DG.T
  new = {'time': _like(_one(0)), 'slope': jax.ShapeDtypeStruct((batch, width), dtype), 'cell_slope': _like(last_cell_slope_BD)}

  def step(state: Any, _: None) -> tuple[Any, None]:
    time_1, seen_slope_BD, cell_slope_BD, changed = state
    read = {'time': time_1, 'seen_slope': seen_slope_BD, 'cell_slope': cell_slope_BD, 'outer_slope': slope_TBD}
    read |= {'acts': passed['acts'], 'cells': passed['cells'], **masks}
    changed, made = _call(_retreat, batch, dim, changed, read, new, interpret)
    seen_slope_BD = jnp.dot(made['slope'], kernel_GD, preferred_element_type=jnp.float32)
    return (made['time'], seen_slope_BD, made['cell_slope'], changed), None

  state = _one(time - 1), last_hidden_slope_BD, last_cell_slope_BD, {'slopes': jnp.zeros((time, batch, width), dtype)}
  (_, hidden_slope_BD, cell_slope_BD, changed), _ = jax.lax.scan(step, state, None, time, unroll=STEPS_A_LAUNCH)
  slopes_TBG = changed['slopes']

  if keep_BD is not None:
    hidden_slope_BD = hidden_slope_BD * keep_BD
  if starts_TB is not None:
    hidden_slope_BD, cell_slope_BD = (jnp.where(starts_TB[0, :, None], 0, x_BD) for x_BD in (hidden_slope_BD, cell_slope_BD))
  with products.operands('float32'):  # the kernel doesn't round
    kernel_slope_DG = recurrence.kernel_slope(first_hidden_BD, passed['hidden'], keep_BD, starts_TB, slopes_TBG)
  return slopes_TBG, slopes_TBG.sum((0, 1), jnp.float32), kernel_slope_DG, (hidden_slope_BD, cell_slope_BD), None, None


recur.defvjp(_forward, _backward)


def _masks(keep_BD: Any, starts_TB: Any) -> dict[str, jax.Array]:
  """What there is of them, as the kernels read it: after the last time nothing starts."""
  starts_SB = None if starts_TB is None else jnp.pad(starts_TB.astype(jnp.int32), ((0, 1), (0, 0)))
  return {name: x for name, x in (('keep', keep_BD), ('starts', starts_SB)) if x is not None}


def _one(number: int) -> jax.Array:
  return jnp.full((1,), number, jnp.int32)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def tile(batch: int, dim: int) -> tuple[int, int]:
  """Rows and columns of the state that a program works on: powers of two, as Triton wants, that divide it."""
  columns = math.gcd(dim, MOST_COLUMNS)
  return math.gcd(batch, TILE // columns), columns


def _call(
  body: Callable[..., None], batch: int, dim: int, changed: dict[str, jax.Array], read: dict[str, jax.Array],
  new: dict[str, jax.ShapeDtypeStruct], interpret: bool,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:  # fmt: skip
  """Runs a kernel over all tiles of the state.

  Its body gets references by name: those that it reads and, as `new_*`, those that it writes. Programs run in any order, so none may
  read what another writes: of what is changed each has its own tile, and what all read, such as the time, is written anew elsewhere.
  """
  from jax.experimental import pallas
  from jax.experimental.pallas import triton

  rows, columns = tile(batch, dim)

  def run(*references: Any) -> None:
    names = [*changed, *read, *(f'new_{name}' for name in (*changed, *new))]
    refs = types.SimpleNamespace(**{'keep': None, 'starts': None} | dict(zip(names, references, strict=True)))
    first = pallas.program_id(1) * columns
    parts = [pallas.ds(first + n * dim, columns) for n in range(4)]
    body(refs, refs.time[0], pallas.ds(pallas.program_id(0) * rows, rows), parts)

  made = pallas.pallas_call(
    run,
    out_shape=[*map(_like, changed.values()), *new.values()],
    grid=(batch // rows, dim // columns),
    input_output_aliases={i: i for i in range(len(changed))},
    compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
    interpret=interpret,
    name=f'lstm{body.__name__}',
  )(*changed.values(), *read.values())
  return dict(zip(changed, made, strict=False)), dict(zip(new, made[len(changed) :], strict=True))


# The kernels' bodies, for `rows` and the columns of one tile: parts[n] are those of gate n, and parts[0] those of the state.


def _advance(refs: Any, time: jax.Array, rows: Any, parts: list[Any]) -> None:
  """What follows the product: gates, cell and hidden state of one time."""
  here, acts = parts[0], []
  for n, part in enumerate(parts):
    product = _unless_start(refs, time, rows, refs.product[rows, part])
    total = refs.acts[time, rows, part] + refs.bias[part][None] + product
    acts.append(jnp.tanh(total) if n == 2 else jax.nn.sigmoid(total))
    refs.new_acts[time, rows, part] = acts[-1]
  i, f, g, o = acts
  cell = f * _unless_start(refs, time, rows, refs.cells[time, rows, here]) + i * g
  hidden = o * jnp.tanh(cell)
  refs.new_cells[time + 1, rows, here] = cell
  refs.new_last[rows, here] = hidden
  refs.new_hidden[time, rows, here] = hidden.astype(refs.new_hidden.dtype)
  seen = hidden if refs.keep is None else hidden * refs.keep[rows, here]
  refs.new_seen[rows, here] = seen.astype(refs.new_seen.dtype)
  refs.new_time[0] = time + 1


def _retreat(refs: Any, time: jax.Array, rows: Any, parts: list[Any]) -> None:
  """The gradients of one time's gates and of the cell before it, from those of the state after it; see `recurrence`."""
  here = parts[0]
  i, f, g, o = (refs.acts[time, rows, part] for part in parts)
  seen_slope = refs.seen_slope[rows, here]
  if refs.keep is not None:  # the last state was on its way to no gates
    seen_slope = seen_slope * jnp.where(time == refs.acts.shape[0] - 1, 1.0, refs.keep[rows, here])
  hidden_slope = _unless_start(refs, time + 1, rows, seen_slope) + refs.outer_slope[time, rows, here].astype(jnp.float32)
  tanh_cell = jnp.tanh(refs.cells[time + 1, rows, here])
  cell_slope = _unless_start(refs, time + 1, rows, refs.cell_slope[rows, here]) + hidden_slope * o * (1 - tanh_cell * tanh_cell)
  slopes = (
    cell_slope * g * i * (1 - i),
    cell_slope * _unless_start(refs, time, rows, refs.cells[time, rows, here]) * f * (1 - f),
    cell_slope * i * (1 - g * g),
    hidden_slope * tanh_cell * o * (1 - o),
  )
  for part, slope in zip(parts, slopes, strict=True):
    refs.new_slopes[time, rows, part] = slope.astype(refs.new_slopes.dtype)
    refs.new_slope[rows, part] = slope.astype(refs.new_slope.dtype)
  refs.new_cell_slope[rows, here] = cell_slope * f
  refs.new_time[0] = time - 1


def _unless_start(refs: Any, time: Any, rows: Any, x: jax.Array) -> jax.Array:
  """0 in the rows that start at the time."""
  return x if refs.starts is None else jnp.where(refs.starts[time, rows][:, None] != 0, jnp.zeros_like(x), x)
