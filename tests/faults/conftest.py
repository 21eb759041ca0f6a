"""What the fault tests share: runs of both models that nothing disturbed."""

import fault_runs
import pytest


@pytest.fixture(scope='session')
def all_runs(tmp_path_factory):
  return {}, tmp_path_factory


@pytest.fixture
def runs_of(all_runs):
  """By the model's name, each made when first asked for."""
  made, tmp_path_factory = all_runs

  def get(kind):
    if kind not in made:
      made[kind] = fault_runs.Runs(tmp_path_factory.mktemp(kind), kind, fault_runs.STEPS_A_KILL * fault_runs.KILLS)
    return made[kind]

  return get
