"""What the fault tests share: runs of both models that nothing disturbed, and programs that are compiled once."""

import fault_runs
import jax
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


@pytest.fixture(scope='module')
def quickly(tmp_path_factory):
  """Runs in this process compile quickly, and once for all that share a program."""
  values = {
    'jax_disable_most_optimizations': True,
    'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('xla')),
    'jax_persistent_cache_min_compile_time_secs': 0.0,
  }
  old = {name: jax.config.values[name] for name in values}
  for name, value in values.items():
    jax.config.update(name, value)
  yield
  for name, value in old.items():
    jax.config.update(name, value)
