import math

import numpy as np
import pytest

from textgen_jax import errors
from textgen_jax.training import schedules


def make(kind, **changes):
  settings = {'peak': 1.0, 'final': 0.1, 'warmup_steps': 4, 'total_steps': 24, 'decay_fraction': 0.25} | changes
  return schedules.build(kind, **settings)


@pytest.mark.parametrize('kind', schedules.KINDS)
def test_warm_up_starts_above_zero_and_ends_at_the_peak(kind):
  schedule = make(kind)
  np.testing.assert_allclose([schedule(n) for n in range(5)], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize(
  ('kind', 'at'),
  [
    # 20 updates after the warm-up: a quarter, the middle, the end of them, and far past it.
    ('cosine', {9: 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, 14: 0.55, 24: 0.1, 1000: 0.1}),
    ('linear', {9: 0.775, 14: 0.55, 24: 0.1, 1000: 0.1}),
    ('constant', {9: 1.0, 14: 1.0, 24: 1.0, 1000: 1.0}),
    # The last quarter of 24 is 6: flat to 18, then 0.15 an update.
    ('wsd', {9: 1.0, 18: 1.0, 19: 0.85, 21: 0.55, 24: 0.1, 1000: 0.1}),
  ],
)
def test_hand_worked_values(kind, at):
  schedule = make(kind)
  np.testing.assert_allclose([schedule(n) for n in at], list(at.values()), rtol=1e-6)


@pytest.mark.parametrize('kind', schedules.KINDS)
@pytest.mark.parametrize('warmup_steps', [0, 1, 4, 23])
def test_continuous_and_never_above_the_peak(kind, warmup_steps):
  schedule = make(kind, warmup_steps=warmup_steps, total_steps=400, decay_fraction=0.2)
  rates = np.array([schedule(n) for n in range(450)])
  assert rates.max() <= 1 + 1e-6
  falls = np.diff(rates)[max(warmup_steps, 1) - 1 :]
  assert falls.max() <= 1e-6  # only down after the warm-up
  assert falls.min() > -0.9 / 80 - 1e-6  # the steepest is wsd's line over 80 updates
  np.testing.assert_allclose(rates[max(warmup_steps, 1) - 1], 1)


@pytest.mark.parametrize('kind', ['cosine', 'linear', 'wsd'])
@pytest.mark.parametrize('decay_fraction', [0.0, 0.5, 0.9, 1.0])
def test_the_final_rate_is_reached_at_the_horizon(kind, decay_fraction):
  schedule = make(kind, decay_fraction=decay_fraction)
  np.testing.assert_allclose([schedule(24), schedule(25)], [0.1, 0.1], rtol=1e-6)


@pytest.mark.parametrize('kind', schedules.KINDS)
def test_a_run_may_end_within_its_warm_up(kind):
  schedule = make(kind, warmup_steps=40)
  np.testing.assert_allclose([schedule(n) for n in (0, 9, 24, 39)], [0.025, 0.25, 0.625, 1.0], rtol=1e-6)


def test_a_zero_peak_is_a_zero_rate():
  schedule = make('cosine', peak=0.0, final=0.0)
  assert [float(schedule(n)) for n in (0, 5, 24, 30)] == [0, 0, 0, 0]


def test_unknown_kind():
  with pytest.raises(errors.UserError, match=r"optimizer.schedule='cosin' is none of cosine, linear, constant, wsd"):
    make('cosin')
