"""An LSTM layer's loop over time: `scan`, and `recur`, the same with a backward pass of its own.

Gates stand side by side in the order input, forget, cell, output, G wide. An invalid token leaves hidden state and cell as
they are; a start zeroes them first.
Source: Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from textgen_jax import backend
from textgen_jax.models import products

Carry = tuple[jax.Array, jax.Array]  # hidden_BD and cell_BD, in float32

STEPS_A_TURN_ON_GPU = 8  # which are launched together: two layers, 1,024 wide, 12.3 ms a step of training became 10.3 on an H200; 32: 11.8


def scan(
  gates_TBG: jax.Array, bias_G: jax.Array, kernel_DG: jax.Array, carry: Carry, keep_BD: Any, valid_TB: Any, starts_TB: Any
) -> tuple[Carry, Carry]:
  """The last carry, and the carries after each time.

  Args:
    gates_TBG: the input's part of the gates, without the bias, in the kernel's type.
    bias_G: in float32.
    keep_BD: what the hidden state is multiplied by on its way to the gates: recurrent dropout. None: by nothing.
    valid_TB: bool. None: all are valid.
    starts_TB: bool. None: none starts.
  """
  multiply = products.multiplier(kernel_DG, len(carry[0]), turns=len(gates_TBG))

  def step(carry: Carry, inputs: Any) -> tuple[Carry, Carry]:
    gates_BG, valid_B, starts_B = inputs
    before = _restart(carry, starts_B)
    acts_BG = _activate(gates_BG, bias_G, multiply(_seen(before[0], keep_BD, kernel_DG.dtype)))
    carry = _hold(valid_B, carry, _advance(acts_BG, before[1]))
    return carry, carry

  return _loop(step, carry, (gates_TBG, valid_TB, starts_TB))


@jax.custom_vjp
def recur(
  gates_TBG: jax.Array, bias_G: jax.Array, kernel_DG: jax.Array, carry: Carry, keep_BD: Any, valid_TB: Any, starts_TB: Any
) -> tuple[jax.Array, Carry]:
  """The hidden states after each time, in the kernel's type, and the last carry; arguments are `scan`'s.

  Where it isn't differentiated it is `scan`. The backward pass multiplies once for the kernel's gradient, over all times, where
  `scan`'s own adds up a matrix a step. What is saved for it, the gates' activations, takes the input's place in memory, as a
  step's are written where its input stood. Masks have no gradient.
  """
  last, (hidden_TBD, _) = scan(gates_TBG, bias_G, kernel_DG, carry, keep_BD, valid_TB, starts_TB)
  return hidden_TBD.astype(kernel_DG.dtype), last


def _forward(
  gates_TBG: jax.Array, bias_G: jax.Array, kernel_DG: jax.Array, carry: Carry, keep_BD: Any, valid_TB: Any, starts_TB: Any
) -> tuple[tuple[jax.Array, Carry], Any]:
  rounded_DG = products.operand(kernel_DG)
  multiply = products.multiplier(rounded_DG, len(carry[0]), turns=len(gates_TBG))

  def step(state: tuple[Carry, jax.Array], inputs: Any) -> tuple[tuple[Carry, jax.Array], Any]:
    carry, acts_TBG = state
    time, valid_B, starts_B = inputs
    before = _restart(carry, starts_B)
    gates_BG = jax.lax.dynamic_index_in_dim(acts_TBG, time, keepdims=False)
    acts_BG = _activate(gates_BG, bias_G, multiply(_seen(before[0], keep_BD, kernel_DG.dtype)))
    acts_TBG = jax.lax.dynamic_update_index_in_dim(acts_TBG, acts_BG, time, 0)
    cell_BD = carry[1]
    carry = _hold(valid_B, carry, _advance(acts_BG, before[1]))
    return (carry, acts_TBG), (carry[0].astype(kernel_DG.dtype), cell_BD)

  inputs = jnp.arange(len(gates_TBG)), valid_TB, starts_TB
  (last, acts_TBG), (hidden_TBD, cell_TBD) = _loop(step, (carry, gates_TBG.astype(jnp.float32)), inputs)
  # Its type tells the backward pass, which may be traced elsewhere, that it is to round.
  return (hidden_TBD, last), (acts_TBG, hidden_TBD, cell_TBD, last[1], carry[0], rounded_DG, keep_BD, valid_TB, starts_TB)


def _backward(residuals: Any, slopes: tuple[jax.Array, Carry]) -> Any:
  hidden_TBD, rounded_DG = residuals[1], residuals[5]
  with products.operands(rounded_DG.dtype.name if hidden_TBD.dtype == jnp.float32 else 'float32'):
    return _slopes(residuals, slopes)


def _slopes(residuals: Any, slopes: tuple[jax.Array, Carry]) -> Any:
  acts_TBG, hidden_TBD, cell_TBD, last_cell_BD, first_hidden_BD, kernel_DG, keep_BD, valid_TB, starts_TB = residuals
  slope_TBD, last_slopes = slopes
  multiply = products.transposed_multiplier(kernel_DG, slope_TBD.shape[1])

  def step(state: tuple[Carry, jax.Array], inputs: Any) -> tuple[tuple[Carry, jax.Array], jax.Array]:
    (hidden_slope_BD, cell_slope_BD), after_BD = state
    slope_BD, acts_BG, cell_BD, valid_B, starts_B = inputs
    after = hidden_slope_BD + slope_BD, cell_slope_BD
    _, before_BD = _restart((cell_BD, cell_BD), starts_B)
    gates_slope_BG, before_cell_slope_BD = _retreat(acts_BG, before_BD, jnp.tanh(after_BD), after)
    if valid_B is not None:
      gates_slope_BG = jnp.where(valid_B[:, None], gates_slope_BG, 0)
    seen_slope_BD = multiply(gates_slope_BG.astype(hidden_TBD.dtype)).astype(jnp.float32)
    before_hidden_slope_BD = seen_slope_BD if keep_BD is None else seen_slope_BD * keep_BD
    before = _hold(valid_B, after, _restart((before_hidden_slope_BD, before_cell_slope_BD), starts_B))
    return (before, cell_BD), gates_slope_BG

  inputs = slope_TBD.astype(jnp.float32), acts_TBG, cell_TBD, valid_TB, starts_TB
  (first_slopes, _), gates_slope_TBG = _loop(step, (last_slopes, last_cell_BD), inputs, reverse=True)
  bias_slope_G = gates_slope_TBG.sum((0, 1))
  gates_slope_TBG = gates_slope_TBG.astype(hidden_TBD.dtype)
  kernel_slope_DG = kernel_slope(first_hidden_BD, hidden_TBD, keep_BD, starts_TB, gates_slope_TBG)
  return gates_slope_TBG, bias_slope_G, kernel_slope_DG, first_slopes, None, None, None


recur.defvjp(_forward, _backward)


def kernel_slope(first_hidden_BD: jax.Array, hidden_TBD: jax.Array, keep_BD: Any, starts_TB: Any, gates_slope_TBG: jax.Array) -> jax.Array:
  """The kernel's gradient, [D, 4 D], by one product over all times; hidden states and the gates' gradients are in the kernel's type."""
  seen_TBD = jnp.concatenate([first_hidden_BD[None].astype(hidden_TBD.dtype), hidden_TBD[:-1]])
  if starts_TB is not None:
    seen_TBD = jnp.where(starts_TB[..., None], 0, seen_TBD)
  if keep_BD is not None:
    seen_TBD = (seen_TBD * keep_BD).astype(hidden_TBD.dtype)
  return products.kernel_gradient(seen_TBD, gates_slope_TBG)


def _loop(step: Callable[..., Any], state: Any, inputs: Any, reverse: bool = False) -> Any:
  return jax.lax.scan(step, state, inputs, reverse=reverse, unroll=STEPS_A_TURN_ON_GPU if backend.name() == 'gpu' else 1)


def _seen(hidden_BD: jax.Array, keep_BD: Any, dtype: Any) -> jax.Array:
  return (hidden_BD if keep_BD is None else hidden_BD * keep_BD).astype(dtype)


def _activate(gates_BG: jax.Array, bias_G: jax.Array, product_BG: jax.Array) -> jax.Array:
  """Sigmoids of three gates, tanh of the cell's."""
  # sigmoid(x) = (1 + tanh(x / 2)) / 2, so that one loop does all four: XLA makes one of each otherwise.
  scale_G = jnp.where(_is_cell(gates_BG), 1.0, 0.5)
  return jnp.tanh((gates_BG.astype(jnp.float32) + bias_G + product_BG.astype(jnp.float32)) * scale_G) * scale_G + (1 - scale_G)


def _advance(acts_BG: jax.Array, cell_BD: jax.Array) -> Carry:
  i, f, g, o = jnp.split(acts_BG, 4, axis=-1)
  new_cell_BD = f * cell_BD + i * g
  return o * jnp.tanh(new_cell_BD), new_cell_BD


def _retreat(acts_BG: jax.Array, before_BD: jax.Array, tanh_after_BD: jax.Array, slopes: Carry) -> tuple[jax.Array, jax.Array]:
  """The gradients of the gates and of the cell before, from those of the hidden state and the cell after."""
  i, f, g, o = jnp.split(acts_BG, 4, axis=-1)
  hidden_slope_BD, cell_slope_BD = slopes
  cell_slope_BD = cell_slope_BD + hidden_slope_BD * o * (1 - jnp.square(tanh_after_BD))
  acts_slopes = cell_slope_BD * g, cell_slope_BD * before_BD, cell_slope_BD * i, hidden_slope_BD * tanh_after_BD
  steepness_BG = jnp.where(_is_cell(acts_BG), 1 - jnp.square(acts_BG), acts_BG * (1 - acts_BG))
  return jnp.concatenate(acts_slopes, axis=-1) * steepness_BG, cell_slope_BD * f


def _is_cell(gates_BG: jax.Array) -> jax.Array:
  width = gates_BG.shape[-1]
  return jnp.arange(width) // (width // 4) == 2


def _restart(carry: Carry, starts_B: Any) -> Carry:
  return carry if starts_B is None else jax.tree.map(lambda x_BD: jnp.where(starts_B[:, None], 0, x_BD), carry)


def _hold(valid_B: Any, old: Carry, new: Carry) -> Carry:
  """An invalid token's start goes with it."""
  return new if valid_B is None else jax.tree.map(lambda new_BD, old_BD: jnp.where(valid_B[:, None], new_BD, old_BD), new, old)
