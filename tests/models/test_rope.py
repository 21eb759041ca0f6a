import jax
import jax.numpy as jnp
import numpy as np

from textgen_jax.models import rope


def rotate(x, position, theta=10_000.0):
  return np.asarray(rope.rotate(jnp.asarray(x, jnp.float32), rope.rotation(jnp.asarray(position), x.shape[-1], theta)))


def test_angles_by_hand():
  x_BTHK = np.broadcast_to([1.0, 2.0, 3.0, 4.0], (2, 3, 1, 4))
  position_BT = np.array([[0, 1, 2], [5, 6, 100]])
  actual = rotate(x_BTHK, position_BT)
  # Pairs (0, 2) and (1, 3), with frequencies 1 and 1 / sqrt(10,000).
  fast, slow = position_BT * 1.0, position_BT * 0.01
  turned = (1 + 3j) * np.exp(1j * fast), (2 + 4j) * np.exp(1j * slow)
  expected = np.stack([turned[0].real, turned[1].real, turned[0].imag, turned[1].imag], axis=-1)
  np.testing.assert_allclose(actual[:, :, 0], expected, atol=3e-5)


def test_scores_depend_on_the_distance_alone():
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, 2, 1, 3, 8))

  def scores(query_at, key_at):
    return np.einsum('BTHK,BTHK->BTH', rotate(q, [[query_at]] * 2), rotate(k, [[key_at]] * 2))

  for distance in (0, 1, 7):
    np.testing.assert_allclose(scores(500 + distance, 500), scores(distance, 0), atol=1e-3)
  assert np.abs(scores(1, 0) - scores(0, 0)).min() > 1e-3
  assert np.abs(scores(1, 0) - scores(0, 1)).min() > 1e-3


def test_norms_stay():
  x = np.random.default_rng(0).normal(size=(2, 3, 2, 8))
  np.testing.assert_allclose(np.linalg.norm(rotate(x, [[0, 3, 4000]]), axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


def test_bfloat16_tells_neighbours_apart_far_out():
  x_BTHK = jnp.ones((1, 2, 1, 2), jnp.bfloat16)
  position_BT = np.array([[1000, 1001]])  # both 1000 in bfloat16
  actual = rope.rotate(x_BTHK, rope.rotation(jnp.asarray(position_BT), 2, 10_000.0))
  assert actual.dtype == jnp.bfloat16
  expected = np.stack([np.cos(position_BT) - np.sin(position_BT), np.cos(position_BT) + np.sin(position_BT)], -1)
  np.testing.assert_allclose(actual[:, :, 0].astype(np.float32), expected, atol=0.01)


def test_known_positions_turn_as_traced_ones():
  position_BT = np.arange(9)[None]
  known, traced = rope.rotation(position_BT, 8, 100.0), jax.jit(lambda p: rope.rotation(p, 8, 100.0))(position_BT)
  assert isinstance(known.cos_BTK, np.ndarray)
  for ours, theirs in zip(known, traced, strict=True):
    assert ours.dtype == theirs.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
