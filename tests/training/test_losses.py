import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from textgen_jax.training import losses


def test_hand_numbers():
  # softmax of ln 1, ln 2, ln 5 is 1/8, 2/8, 5/8; of equal logits a third each.
  logits_BTV = jnp.log(jnp.array([[[1.0, 2.0, 5.0], [7.0, 7.0, 7.0]], [[1.0, 2.0, 5.0], [3.0, 1.0, 4.0]]]))
  nll_BT = losses.nll(logits_BTV, np.array([[2, 0], [0, 1]]))
  np.testing.assert_allclose(nll_BT, np.log([[8 / 5, 3.0], [8.0, 8.0]]), rtol=1e-6)


def test_padded_vocabulary_takes_no_mass_and_gives_no_nan():
  free_BTV = jnp.array([[[0.0, 1.0, 2.0], [3.0, -1.0, 0.5]], [[1.0, 1.0, 1.0], [-40.0, 80.0, 0.0]]])
  padded_BTV = jnp.pad(free_BTV, ((0, 0), (0, 0), (0, 2)), constant_values=-jnp.inf)
  targets_BT = np.array([[1, 0], [2, 1]])

  def total(logits_BTV):
    return losses.nll(logits_BTV, targets_BT).sum()

  np.testing.assert_array_equal(losses.nll(padded_BTV, targets_BT), losses.nll(free_BTV, targets_BT))
  gradient = jax.grad(total)(padded_BTV)
  np.testing.assert_allclose(gradient[..., :3], jax.nn.softmax(free_BTV) - jax.nn.one_hot(targets_BT, 3), atol=1e-6)
  np.testing.assert_array_equal(gradient[..., 3:], 0)


def test_large_logits_do_not_overflow():
  logits_BTV = jnp.array([[[1e4, 0.0], [-1e4, 0.0]]])
  np.testing.assert_allclose(losses.nll(logits_BTV, np.array([[1, 0]])), [[1e4, 1e4]])


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_agrees_with_optax_and_is_float32(dtype):
  rng = np.random.default_rng(0)
  logits_BTV = jnp.asarray(5 * rng.standard_normal((3, 7, 40)), dtype)
  targets_BT = rng.integers(0, 40, (3, 7))
  nll_BT = losses.nll(logits_BTV, targets_BT)
  assert nll_BT.dtype == jnp.float32
  expected = optax.softmax_cross_entropy_with_integer_labels(logits_BTV.astype(jnp.float32), targets_BT)
  np.testing.assert_allclose(nll_BT, expected, rtol=1e-5, atol=1e-6)


def test_entropy_by_hand():
  no = -np.inf
  logits_BTV = np.array([[[0, 0, 0, 0], [0, no, 0, no]], [[1e4, 0, 0, 0], [np.log(3), 0, no, no]]])
  uneven = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
  np.testing.assert_allclose(losses.entropy(jnp.asarray(logits_BTV)), [[np.log(4), np.log(2)], [0, uneven]], atol=1e-6)
