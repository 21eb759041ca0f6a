"""`scan`, and `recur` with its own backward pass, beside the textbook's step differentiated by JAX."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from textgen_jax import backend
from textgen_jax.models import products, recurrence

T, B, D = 7, 3, 5

quick_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def textbook(gates_TBG, bias_G, kernel_DG, carry, keep_BD, valid_TB, starts_TB):
  """Hidden states, cells and the last carry."""

  def step(carry, inputs):
    gates_BG, valid_B, starts_B = inputs
    hidden, cell = carry
    if starts_B is not None:
      hidden, cell = (jnp.where(starts_B[:, None], 0, x) for x in (hidden, cell))
    seen = hidden if keep_BD is None else hidden * keep_BD
    i, f, g, o = jnp.split(gates_BG + bias_G + seen @ kernel_DG, 4, axis=-1)
    cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    new = jax.nn.sigmoid(o) * jnp.tanh(cell), cell
    if valid_B is not None:
      new = tuple(jnp.where(valid_B[:, None], x, old) for x, old in zip(new, carry, strict=True))
    return new, new

  last, (hidden_TBD, cell_TBD) = jax.lax.scan(step, carry, (gates_TBG, valid_TB, starts_TB))
  return hidden_TBD, cell_TBD, last


def inputs():
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  return normal(T, B, 4 * D), normal(4 * D), normal(D, 4 * D), (normal(B, D), normal(B, D))


def masks(kept, valid, starts):
  """Of the kinds asked for. Both an invalid token and a start are first, last, side by side and, in one place, together."""
  rng = np.random.default_rng(1)
  keep_BD = jnp.asarray(rng.choice([0.0, 2.0], size=(B, D)), jnp.float32) if kept else None
  valid_TB, starts_TB = np.ones((T, B), bool), np.zeros((T, B), bool)
  valid_TB[[0, 3, 4, 6], [0, 0, 1, 2]] = False
  starts_TB[[0, 3, 3, 4, 5, 6], [1, 0, 2, 2, 1, 0]] = True
  return keep_BD, valid_TB if valid else None, starts_TB if starts else None


def assert_all_close(actual, expected):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6 * np.abs(y).max()), actual, expected)


every_mask = pytest.mark.parametrize('kinds', [*itertools.product([False, True], repeat=3)], ids=str)


@pytest.fixture(params=[False, True], ids=['plain', 'by_columns'])
def by_columns(request, monkeypatch):
  """The product of each time, either way."""
  if request.param:
    monkeypatch.setattr(products, 'MIN_SIDE', 1)
    monkeypatch.setattr(products, 'SIDE_PER_ROW', 1)
    monkeypatch.setattr(products, 'MIN_TURNS', T)
  return request.param


@every_mask
def test_outputs_carry_and_every_gradient_are_the_textbook_s(kinds, by_columns):
  args, mask = inputs(), masks(*kinds)
  weights = np.random.default_rng(2).normal(size=(T + 2, B, D))

  def total(loop, args):
    hidden_TBD, (hidden_BD, cell_BD) = outputs = loop(*args, *mask)
    return jnp.vdot(jnp.concatenate([hidden_TBD, hidden_BD[None], cell_BD[None]]), weights), outputs

  def reference(*args):
    hidden_TBD, _, last = textbook(*args)
    return hidden_TBD, last

  @quick_jit
  def both(args):
    return [jax.grad(functools.partial(total, loop), has_aux=True)(args) for loop in (recurrence.recur, reference)]

  assert ('optimization_barrier' in both.lower(args).as_text()) == by_columns
  (slopes, outputs), (expected_slopes, expected) = both(args)
  assert_all_close(outputs, expected)
  assert_all_close(slopes, expected_slopes)
  assert all(np.abs(x).max() > 0.01 for x in jax.tree.leaves(expected_slopes))


def test_a_gpu_s_loop_of_several_steps_a_turn_is_the_same(monkeypatch):
  args, mask = inputs(), masks(True, True, True)
  monkeypatch.setattr(recurrence, 'STEPS_A_TURN_ON_GPU', 3)  # of seven

  def total(args):
    return jnp.sin(recurrence.recur(*args, *mask)[0]).sum()

  expected = quick_jit(jax.value_and_grad(total))(args)
  with backend.target('gpu'):
    text = quick_jit(jax.value_and_grad(lambda args: total(args))).lower(args)
    assert_all_close(quick_jit(jax.value_and_grad(lambda args: total(args)))(args), expected)
  assert text.as_text() != quick_jit(jax.value_and_grad(total)).lower(args).as_text()


@every_mask
def test_without_a_gradient_it_is_a_scan_that_gives_every_carry(kinds, by_columns):
  args, mask = inputs(), masks(*kinds)

  @quick_jit
  def all_three(args):
    return textbook(*args, *mask), recurrence.scan(*args, *mask), recurrence.recur(*args, *mask)

  assert ('optimization_barrier' in all_three.lower(args).as_text()) == by_columns
  (hidden_TBD, cell_TBD, last), scanned, recurred = all_three(args)
  assert_all_close(scanned, (last, (hidden_TBD, cell_TBD)))
  assert_all_close(recurred, (hidden_TBD, last))


def test_what_is_kept_for_the_backward_pass_takes_the_input_s_place():
  """Beside the gates' gradients no array of their size is made: a copy a step would be, were the loop not in place."""
  time, batch, dim = 64, 4, 32
  gates = 4 * time * batch * 4 * dim  # bytes

  def total(gates_TBG, kernel_DG):
    carry = (jnp.zeros((batch, dim)),) * 2
    return recurrence.recur(2 * gates_TBG, jnp.zeros(4 * dim), kernel_DG, carry, None, None, None)[0].sum()

  made = jax.jit(jax.grad(total, argnums=1)).lower(jnp.zeros((time, batch, 4 * dim)), jnp.zeros((dim, 4 * dim))).compile()
  assert made.memory_analysis().temp_size_in_bytes < 3.3 * gates
  assert not [line for line in made.as_text().splitlines() if f'f32[{time},{batch},{4 * dim}]' in line and ' copy(' in line]


def test_gradients_in_bfloat16_are_near_and_in_the_arguments_types(by_columns):
  args, mask = inputs(), masks(True, True, True)
  small = args[0].astype(jnp.bfloat16), args[1], args[2].astype(jnp.bfloat16), args[3]

  def total(args):
    return recurrence.recur(*args, *mask)[0].astype(jnp.float32).sum()

  slopes, expected = (quick_jit(jax.grad(total))(x) for x in (small, args))
  assert [x.dtype for x in jax.tree.leaves(slopes)] == [x.dtype for x in jax.tree.leaves(small)]
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=0, atol=0.05 * np.abs(y).max()), slopes, expected)
