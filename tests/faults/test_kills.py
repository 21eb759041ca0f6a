"""Killed at any moment and started again, a run ends bit for bit where it would have."""

import fault_runs
import pytest


@pytest.mark.parametrize('kind', fault_runs.MODELS)
def test_killed_at_random_moments(kind, runs_of, tmp_path):
  # The two models' runs share the kinds of moments: each kind is met.
  first = 0 if kind == 'transformer' else fault_runs.KILLS
  moments = [fault_runs.MOMENTS[n % len(fault_runs.MOMENTS)] for n in range(first, first + fault_runs.KILLS)]
  runs = runs_of(kind)
  history = fault_runs.kill_again_and_again(runs, tmp_path / 'killed', moments)
  print(*history, sep='\n')
  assert sum(kill['unfinished'] is not None for kill in history) > fault_runs.KILLS // 2, history
  fault_runs.assert_same_end(tmp_path / 'killed', runs.whole)
