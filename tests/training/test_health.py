import jax
import jax.numpy as jnp
import numpy as np
import pytest

from textgen_jax import errors
from textgen_jax.training import health


def fed(losses, **flags):
  one = health.fresh()
  flags = {'counts': jnp.array(True), 'applied': jnp.array(True), 'spiked': jnp.array(False)} | flags
  observe = jax.jit(health.observe)
  for loss in losses:
    one = observe(one, jnp.float32(loss), **flags)
  return one


def test_mean_and_variance_are_those_of_all_losses_at_first():
  losses = np.random.default_rng(0).normal(3, 0.5, health.WINDOW)
  for count in (1, 2, 7, health.WINDOW):
    found = fed(losses[:count])
    assert found.losses == count
    np.testing.assert_allclose(found.loss_mean, losses[:count].mean(), rtol=1e-5)
    np.testing.assert_allclose(found.loss_variance, losses[:count].var(), rtol=1e-4, atol=1e-7)


def test_then_old_losses_are_forgotten():
  """By hand: weights of (1 - 1 / WINDOW) ** age, and the first WINDOW losses share what is left."""
  rng = np.random.default_rng(1)
  losses = np.concatenate([rng.normal(9, 1, health.WINDOW), rng.normal(2, 0.1, 300)])
  weights = (1 - 1 / health.WINDOW) ** np.arange(300)[::-1] / health.WINDOW
  weights = np.concatenate([np.full(health.WINDOW, (1 - weights.sum()) / health.WINDOW), weights])
  found = fed(losses)
  mean = (weights * losses).sum()
  np.testing.assert_allclose(found.loss_mean, mean, rtol=1e-4)
  np.testing.assert_allclose(found.loss_variance, (weights * (losses - mean) ** 2).sum(), rtol=1e-3)


def test_what_does_not_count_leaves_no_trace():
  before = fed([3.0, 2.0, 2.5])
  for loss in (np.nan, np.inf, 1e30):
    no = jnp.array(False)
    after = health.observe(before, jnp.float32(loss), counts=no, applied=no, spiked=jnp.array(loss == 1e30))
    for name in ('loss_mean', 'loss_variance', 'losses'):
      assert getattr(after, name) == getattr(before, name)
    assert (after.skipped_in_a_row, after.spiked_steps) == (1, int(loss == 1e30))
    # The next update ends the row of skipped ones.
    assert health.observe(after, jnp.float32(2.0), counts=~no, applied=~no, spiked=no).skipped_in_a_row == 0


def test_a_spike_is_seen_above_its_deviations_once_there_are_enough_losses():
  losses = np.tile([1.0, 3.0], health.FEWEST_LOSSES // 2)  # mean 2, deviation 1
  enough, few = fed(losses), fed(losses[:-1])
  for loss, deviations, expected in [(7.9, 6.0, False), (8.1, 6.0, True), (8.1, np.inf, False), (4.5, 2.0, True), (-9.0, 2.0, False)]:
    assert bool(health.is_spike(enough, jnp.float32(loss), deviations)) is expected
    assert not health.is_spike(few, jnp.float32(loss), deviations)
  flat = fed([2.0] * health.FEWEST_LOSSES)  # infinitely many of no deviation at all
  assert not health.is_spike(flat, jnp.float32(5.0), np.inf)


def test_jumps_lead_on_from_their_step():
  jumps = health.jumps_from([[11, 20], [31, 45]])
  assert [health.data_offset(jumps, step) for step in (1, 10, 11, 30, 31, 99)] == [0, 0, 20, 20, 45, 45]
  assert health.data_offset([], 5) == 0


@pytest.mark.parametrize('stored', [3, [[1]], [['a', 2]], 'x', [None], [[1, 2, 3]]])
def test_jumps_that_are_none(stored):
  with pytest.raises(errors.NoGoodCheckpoint, match='no pairs of numbers'):
    health.jumps_from(stored)
