"""What training does about steps that are not finite, spikes, and rollbacks; killed or not."""

import dataclasses
import functools
import json
import signal

import jax.numpy as jnp
import numpy as np
import pytest
import spiking
from spiking import NUM_STEPS

from textgen_jax import assembly, errors, rerun, trainer, watch
from textgen_jax.tools import replay, verify_resume
from textgen_jax.training import checkpoints

pytestmark = pytest.mark.usefixtures('quickly')


@pytest.fixture
def spikes(monkeypatch):
  return spiking.plant(monkeypatch)


@pytest.fixture(scope='module')
def make(tmp_path_factory):
  return functools.partial(spiking.experiment, tmp_path_factory.mktemp('text'))


def column(directory, name):
  lines = map(json.loads, (directory / 'metrics.jsonl').read_text().splitlines())
  return {line['step']: line[name] for line in lines if name in line}


def stored(directory, step=NUM_STEPS):
  return verify_resume.stored(directory, step)


def assert_same_end(a, b):
  one, other = stored(a), stored(b)
  assert set(one) == set(other)
  for name, x in one.items():
    np.testing.assert_array_equal(x, other[name], err_msg=name)
  for name in ('train/loss', 'train/grad_norm', 'rollback/data_offset'):
    assert column(a, name) == column(b, name)


def poisoned(inputs):
  """NaN in the batches of `spikes`."""
  return jnp.where((inputs.batch.targets_BT == spiking.RARE).all(), jnp.nan, 0.0), {}


@pytest.mark.parametrize(('kind', 'steps_per_dispatch'), [('transformer', 1), ('lstm', 4)])
def test_a_row_of_bad_steps_is_told_once_with_its_cause_and_gone_past(kind, steps_per_dispatch, make, spikes, tmp_path, capfd):
  spikes |= {20, 21, 22, 30}
  trainer.train(make(kind, max_skipped_steps=4, steps_per_dispatch=steps_per_dispatch), tmp_path, poisoned)
  told = [line for line in capfd.readouterr().err.splitlines() if 'is skipped' in line]
  cause = 'all activations and losses of tokens are finite; the term of the loss hook is not'
  assert told == [f'step 21 is skipped: {cause}', f'step 31 is skipped: {cause}']
  skipped = column(tmp_path, 'train/skipped_steps')
  assert [skipped[step] for step in (20, 21, 23, 30, 31, 45)] == [0, 1, 3, 3, 4, 4]
  assert int(stored(tmp_path)['state/updates']) == 41
  assert all(np.isfinite(x).all() for x in stored(tmp_path).values())


def test_one_bad_step_too_many_in_a_row_ends_the_run_also_where_it_was_interrupted(make, spikes, tmp_path, monkeypatch):
  spikes |= {20, 21, 22, 30}
  given = make(max_skipped_steps=3, checkpoint_every_steps=1)
  with pytest.raises(errors.Diverged, match=r'^steps 21 to 23: no update was applied; step 23: .* the loss hook is not$'):
    trainer.train(given, tmp_path / 'whole', poisoned)
  # The checkpoint of step 22 remembers two of them; its parameters are those of step 20.
  with pytest.raises(errors.Diverged, match=r'^steps 21 to 23: '):
    trainer.train(given, tmp_path / 'whole', poisoned)
  kept = [int(path.name) for path in (tmp_path / 'whole/checkpoints').iterdir()]
  assert max(kept) == 22
  assert all(np.isfinite(x).all() for x in stored(tmp_path / 'whole', 22).values())
  given.training.max_skipped_steps = 4  # may change
  trainer.train(given, tmp_path / 'whole', poisoned)


def test_spikes_are_let_through_unless_asked_for(make, spikes, tmp_path):
  spikes.add(30)
  trainer.train(make(), tmp_path)
  assert column(tmp_path, 'train/spiked_steps')[NUM_STEPS] == 0
  assert int(stored(tmp_path)['state/updates']) == NUM_STEPS


@pytest.mark.parametrize(('kind', 'steps_per_dispatch'), [('transformer', 1), ('lstm', 4)])
def test_a_spike_is_skipped(kind, steps_per_dispatch, make, spikes, tmp_path, capfd):
  spikes.add(30)
  trainer.train(make(kind, spike_policy='skip', steps_per_dispatch=steps_per_dispatch), tmp_path)
  loss, spiked = column(tmp_path, 'train/loss'), column(tmp_path, 'train/spiked_steps')
  assert f'step 31: a loss of {loss[31]:.4f} nats is a spike; the update is skipped' in capfd.readouterr().err
  assert (spiked[30], spiked[31], spiked[NUM_STEPS]) == (0, 1, 1)
  assert set(column(tmp_path, 'train/skipped_steps').values()) == {0}
  assert int(stored(tmp_path)['state/updates']) == NUM_STEPS - 1


def test_a_loss_that_stays_above_is_a_divergence(make, spikes, tmp_path):
  spikes |= set(range(20, 45))
  with pytest.raises(errors.Diverged, match=r'^steps 21 to 25: no update was applied; losses were spikes or not finite$'):
    trainer.train(make(spike_policy='skip', max_skipped_steps=5), tmp_path)


def test_a_rollback_goes_past_the_batches_of_the_spike(make, spikes, tmp_path, capfd):
  """As a run that was at step 19 from the start, and then read on after the spike's batch."""
  spikes.add(30)
  read = []
  original = assembly.Parts.inputs

  def inputs(self, places):
    read.extend(places)
    return original(self, places)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(assembly.Parts, 'inputs', inputs)
    trainer.train(make(spike_policy='rollback'), tmp_path)
  said = capfd.readouterr().err
  assert 'nats is a spike: going back to step 19, and on with the batches after it' in said
  assert read[-26:] == list(range(31, 57))  # of steps 20 to 45
  state = stored(tmp_path)
  assert (int(state['state/data_offset']), int(state['state/step']), int(state['state/updates'])) == (12, 45, 45)
  assert (int(state['state/health/spike_step']), int(state['state/health/rollbacks'])) == (31, 1)
  assert column(tmp_path, 'rollback/spike_step') == {20: 31}
  assert list(column(tmp_path, 'train/loss')) == list(range(1, 46))
  # Up to step 19 it is the run that would have been.
  spikes.clear()
  trainer.train(make(spike_policy='rollback'), tmp_path / 'other')
  losses, others = column(tmp_path, 'train/loss'), column(tmp_path / 'other', 'train/loss')
  assert [losses[step] == others[step] for step in (1, 18, 19, 20, 21)] == [True, True, True, False, False]


class Killed(Exception):
  """As by SIGKILL: nothing after it runs."""


KILLS = {
  'before checkpoints are deleted': (checkpoints.Checkpoints, 'forget_after', False),
  'after they are': (checkpoints.Checkpoints, 'forget_after', True),
  'on the way': (rerun, 'advance', False),
  'right after it': (watch.Watch, 'roll_back', True),
  'steps later': (None, '', False),
}


@pytest.mark.parametrize('moment', list(KILLS))
def test_killed_around_a_rollback_it_ends_the_same(moment, make, spikes, tmp_path, monkeypatch):
  spikes |= {24, 33, 55}  # the second soon after the first, and one after all
  given = make('lstm' if moment == 'on the way' else 'transformer', spike_policy='rollback')
  given.training.steps_per_dispatch = 3 if moment in ('on the way', 'steps later') else 1
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  trainer.train(given, whole)
  assert len(column(whole, 'rollback/spike_step')) >= 2

  owner, name, after = KILLS[moment]
  for count in (1, 2):  # at the first rollback, and at the next one
    with monkeypatch.context() as patch:
      if owner is None:
        original = watch.Watch.look

        def look(self, done, *args, original=original, count=count):
          if len(self.jumps) == count and done == self.jumps[-1].step + 5:
            raise Killed
          return original(self, done, *args)

        patch.setattr(watch.Watch, 'look', look)
      else:
        original = getattr(owner, name)

        def dying(*args, original=original, **kwargs):
          if after:
            original(*args, **kwargs)
          raise Killed

        patch.setattr(owner, name, dying)
      with pytest.raises(Killed):
        trainer.train(given, killed)
    if owner is not None:
      break
  trainer.train(given, killed)
  assert_same_end(whole, killed)


def test_which_checkpoints_are_kept_changes_no_rollback(make, spikes, tmp_path):
  spikes |= {24, 38}
  one = make(spike_policy='rollback')
  trainer.train(one, tmp_path / 'one')
  trainer.train(dataclasses.replace(one, training=dataclasses.replace(one.training, checkpoint_every_steps=0)), tmp_path / 'none')
  other = dataclasses.replace(one.training, checkpoint_every_steps=3, keep_every_steps=6, eval_every_steps=5)
  trainer.train(dataclasses.replace(one, training=other), tmp_path / 'many')
  assert_same_end(tmp_path / 'one', tmp_path / 'none')
  assert_same_end(tmp_path / 'one', tmp_path / 'many')
  kept = sorted(int(path.name) for path in (tmp_path / 'many/checkpoints').iterdir())
  assert {6, 12, 18, 24, 30, 36, 42} <= set(kept)


def test_dispatches_of_several_steps_are_rolled_back_and_replayed(make, spikes, tmp_path):
  """The steps after a spike that were in its dispatch are as if they had never been."""
  spikes.add(24)
  trainer.train(make(spike_policy='rollback', steps_per_dispatch=5, num_steps=30), tmp_path)
  assert column(tmp_path, 'rollback/spike_step') == {14: 25}
  assert column(tmp_path, 'rollback/data_offset') == {14: 12}
  assert list(column(tmp_path, 'train/loss')) == list(range(1, 31))
  for step, nearest in ((13, 0), (27, 24)):
    first, *_ = replay.replay(tmp_path, step)
    assert (first['from_step'], first['differences'], first['applied']) == (nearest, {}, True)
    assert first['loss'] == column(tmp_path, 'train/loss')[step]


def test_rollbacks_that_never_get_past_the_spike_end_the_run(make, spikes, tmp_path, capfd):
  spikes |= set(range(25, 1000))
  # Each spike comes two steps before the last one: the batch of the step after the place that was gone back to.
  with pytest.raises(errors.Diverged, match=r'^step 16: .* and 5 rollbacks did not get past step 26$'):
    trainer.train(make(spike_policy='rollback', rollback_steps=3), tmp_path)
  assert capfd.readouterr().err.count('going back to step') == 5


def test_a_signal_on_the_way_back_ends_the_run_where_it_can_go_on(make, spikes, tmp_path, monkeypatch):
  spikes.add(30)
  given = make(spike_policy='rollback')
  original = rerun.nearest

  def interrupted(*args):
    signal.raise_signal(signal.SIGTERM)
    return original(*args)

  with monkeypatch.context() as patch:
    patch.setattr(rerun, 'nearest', interrupted)
    with pytest.raises(errors.Stopped, match=r'^SIGTERM: .*; the same command goes on from step 16$') as caught:
      trainer.train(given, tmp_path / 'stopped')
  assert caught.value.exit_code == 143
  trainer.train(given, tmp_path / 'stopped')
  trainer.train(given, tmp_path / 'whole')
  assert_same_end(tmp_path / 'stopped', tmp_path / 'whole')
