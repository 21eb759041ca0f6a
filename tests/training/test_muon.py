import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from textgen_jax.training import muon


def matrices(rng, *shapes):
  return {f'{i}': jnp.asarray(rng.standard_normal(shape), jnp.float32) for i, shape in enumerate(shapes)}


def test_singular_values_come_near_one_and_directions_stay():
  rng = np.random.default_rng(0)
  # Well conditioned: the iteration lifts a singular value of 1% of the norm to about a half only.
  x_NDF = np.stack([np.linalg.qr(rng.standard_normal((9, 4)))[0].T * np.array([[3.0], [2.0], [1.0], [0.7]]) for _ in range(2)])
  out_NDF = np.asarray(muon.orthogonalize(jnp.asarray(x_NDF, jnp.float32)))
  for x_DF, out_DF in zip(x_NDF, out_NDF, strict=True):
    u, _, v = np.linalg.svd(x_DF, full_matrices=False)
    inner = u.T @ out_DF @ v.T
    assert (np.diag(inner) > 0.6).all()
    assert (np.diag(inner) < 1.3).all()
    np.testing.assert_allclose(inner - np.diag(np.diag(inner)), 0, atol=1e-4)


@pytest.mark.parametrize('shapes', [[(3, 5), (5, 3), (3, 5), (4, 4)], [(2, 7)]])
def test_the_first_update_is_optax_s(shapes):
  grads = matrices(np.random.default_rng(1), *shapes)
  ours, theirs = muon.scale_by_muon(0.95), contrib.scale_by_muon(beta=0.95, weight_dimension_numbers={
    name: contrib.MuonDimensionNumbers() for name in grads
  })
  expected, _ = theirs.update(grads, theirs.init(grads))
  found, _ = ours.update(grads, ours.init(grads))
  for name, x in found.items():
    rows, columns = x.shape
    np.testing.assert_allclose(x, expected[name] * max(1, columns / rows) ** 0.5, rtol=1e-4, atol=1e-5)


def by_hand(gradients, momentum):
  """Nesterov momentum and the iteration, in float64, of one wide matrix."""
  kept = np.zeros_like(gradients[0])
  for g in gradients:
    kept = momentum * kept + (1 - momentum) * g
    x = momentum * kept + (1 - momentum) * g
    x = x / np.linalg.norm(x)
    for _ in range(5):
      square = x @ x.T
      x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
  return x * max(1, x.shape[1] / x.shape[0]) ** 0.5


def test_momentum_over_several_updates():
  rng = np.random.default_rng(2)
  steps = [matrices(rng, (3, 5), (5, 3)) for _ in range(3)]
  tx = muon.scale_by_muon(0.8)
  state = tx.init(steps[0])
  for grads in steps:
    found, state = tx.update(grads, state)
  np.testing.assert_allclose(found['0'], by_hand([np.asarray(g['0'], np.float64) for g in steps], 0.8), rtol=1e-4, atol=1e-5)
  tall = by_hand([np.asarray(g['1'], np.float64).T for g in steps], 0.8).T / (5 / 3) ** 0.5  # a tall one isn't scaled
  np.testing.assert_allclose(found['1'], tall, rtol=1e-4, atol=1e-5)


def test_matrices_of_zeros_that_even_a_stack_out_change_nothing():
  def spread(work):
    return lambda stack_NDF: work(jnp.pad(stack_NDF, ((0, 2), (0, 0), (0, 0))))[: len(stack_NDF)]

  grads = matrices(np.random.default_rng(3), (3, 5), (5, 3), (3, 5))
  plain, spread_out = muon.scale_by_muon(0.9), muon.scale_by_muon(0.9, spread)
  expected, found = (tx.update(grads, tx.init(grads))[0] for tx in (plain, spread_out))
  for name in grads:
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_what_is_no_matrix_is_refused():
  grads = {'vector': jnp.ones(3)}
  tx: optax.GradientTransformation = muon.scale_by_muon(0.9)
  with pytest.raises(ValueError, match=r'matrices.*\(3,\)'):
    tx.update(grads, tx.init(grads))
