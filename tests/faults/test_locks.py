"""Two trainers that begin at once on a workdir that neither has seen."""

import contextlib

import fault_damage
import fault_runs

import train
from textgen_jax import workdir as workdir_lib


def test_a_trainer_that_comes_second_goes_on_where_the_first_was_killed(runs_of, tmp_path, quickly, monkeypatch):
  runs, locked, calls = runs_of('lstm'), workdir_lib.locked, []

  @contextlib.contextmanager
  def late(directory):
    calls.append(directory)
    if len(calls) == 1:  # while we read the text another one has been here
      told = fault_damage.told(train.main, runs.argv(directory, '--config.training.num_steps=4', '--config.optimizer.schedule_steps=8'))
      assert told[0] == 0
    with locked(directory):
      yield

  monkeypatch.setattr(workdir_lib, 'locked', late)
  code, _, err = fault_damage.told(train.main, runs.argv(tmp_path / 'run', '--config.training.num_steps=8'))
  assert (code, len(calls)) == (0, 2)
  assert 'going on from step 4 of' in err
  assert [record['step'] for record in fault_runs.records(tmp_path / 'run') if 'train/loss' in record] == list(range(1, 9))
