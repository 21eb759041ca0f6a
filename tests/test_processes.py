"""Several processes train as one does: the same batches, losses and leaves, and a run moves between numbers of them."""

import json
from unittest import mock

import fault_runs
import jax
import numpy as np
import process_runs
import pytest

from textgen_jax import errors, launch, launch_flags, processes, sharding


@pytest.fixture(scope='module', params=['transformer', 'lstm'])
def runs(request, tmp_path_factory):
  """A run of one process and the same of two with two devices each."""
  cluster = process_runs.Cluster(tmp_path_factory.mktemp(request.param), request.param)
  one, two = cluster.directory / 'one', cluster.directory / 'two'
  cluster.finish(one, 1, '--config.training.num_steps=28', '--config.sharding.fsdp=1')
  return cluster, one, two, cluster.finish(two, 2, devices=2)


def losses(workdir):
  return {record['step']: record['train/loss'] for record in fault_runs.records(workdir) if 'train/loss' in record}


def val_losses(workdir):
  return [record['val/loss'] for record in fault_runs.records(workdir) if 'val/loss' in record]


def test_two_processes_have_the_losses_of_one_and_one_of_them_writes(runs):
  _cluster, one, two, (leader, other) = runs
  ours, theirs = losses(two), losses(one)
  assert list(ours) == list(range(1, 21))  # each step once: two writers would have written it twice
  assert ours == pytest.approx({step: theirs[step] for step in ours}, rel=1e-5)
  assert val_losses(two) == pytest.approx(val_losses(one)[:2], rel=1e-5)
  assert 'step 20/20' in leader
  assert '2 processes, 4 devices: data=2 fsdp=2 tensor=1' in leader
  assert 'loss' not in other
  assert fault_runs.unfinished(two) == []
  assert not (two / 'lock').exists()


def test_a_run_moves_from_two_processes_to_one_to_four(runs):
  cluster, one, two, _ = runs
  read = [json.loads(line) for count, devices in ((2, 2), (1, 1), (4, 1)) for line in process_runs.hashes(cluster, two, count, devices)]
  assert [found['processes'] for found in read] == [2, 2, 1, 4, 4, 4, 4]
  assert all(found['hashes'] == read[0]['hashes'] for found in read)  # bit for bit, batches too
  assert [found['rows'] for found in read] == [4, 4, 8, 2, 2, 2, 2]  # each reads its own
  cluster.finish(two, 1, '--config.training.num_steps=24', '--config.sharding.fsdp=1')
  cluster.finish(two, 4, '--config.training.num_steps=28', '--config.sharding.fsdp=4')
  assert losses(two) == pytest.approx(losses(one), rel=1e-5)


def test_a_process_alone_agrees_with_itself():
  assert processes.count() == 1
  assert processes.is_leader()
  assert processes.from_leader(lambda: 7) == 7
  assert processes.everyone('x') == ['x']
  processes.same({'a': 1})
  lockstep = processes.Lockstep()
  assert lockstep.look(None) is None
  assert lockstep.look((143, 'SIGTERM')) == (143, 'SIGTERM')
  launch.leave(5, 'it returns')


@pytest.mark.parametrize(
  ('given', 'told'),
  [
    ({'coordinator': 'host:1'}, '--num_processes is missing: --coordinator, --num_processes and --process_id go together'),
    ({'coordinator': ':1', 'num_processes': 2, 'process_id': 0}, "--coordinator=':1' isn't HOST:PORT"),
    ({'coordinator': 'host', 'num_processes': 2, 'process_id': 0}, "--coordinator='host' isn't HOST:PORT"),
    ({'coordinator': 'host:1', 'num_processes': 2, 'process_id': 2}, '--process_id=2 is not in [0, --num_processes=2)'),
    ({'coordinator': 'host:1', 'num_processes': 0, 'process_id': 0}, '--num_processes=0 is below 1'),
    ({'hang_timeout_s': 0}, '--hang_timeout_s=0 is below 1'),
  ],
)
def test_flags_that_do_not_go_together(given, told):
  with pytest.raises(errors.UserError) as error:
    launch_flags.Launch(**given).check()
  assert str(error.value) == told


@pytest.mark.parametrize(('tasks', 'given', 'several'), [('1', None, False), ('2', None, True), ('2', 1, False)])
def test_slurm_tells_how_many_there_are_and_a_flag_that_this_is_alone(monkeypatch, tasks, given, several):
  for name, value in {'JOB_ID': '1', 'STEP_NODELIST': 'n1', 'NTASKS': tasks, 'PROCID': '0', 'LOCALID': '0'}.items():
    monkeypatch.setenv(f'SLURM_{name}', value)
  launched = launch_flags.Launch(num_processes=given)
  launched.check()
  assert launched.several is several


def test_each_exit_code_is_its_error_again():
  for kind in (errors.UserError, errors.Diverged, errors.NoGoodCheckpoint, errors.MachineFailed, errors.TimeIsUp):
    assert type(processes.as_error(kind.exit_code, 'why')) is kind
  assert processes.as_error(143, 'why').exit_code == 143


def test_each_process_lays_down_the_rows_that_it_has():
  """A process whose devices hold rows 2 to 5 of 8 has no others: what it assembles is as the whole's part."""
  whole = np.arange(8 * 3).reshape(8, 3)
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  seen = []
  with mock.patch.object(jax, 'make_array_from_callback', lambda shape, sharding, part: seen.append((shape, part))):
    sharding._assemble(whole[2:6], (8, 3), here, 2, 0)
    sharding._assemble(np.stack([whole[2:6]] * 2), (2, 8, 3), here, 2, 1)
  (shape, part), (stacked_shape, stacked_part) = seen
  assert (shape, stacked_shape) == ((8, 3), (2, 8, 3))
  np.testing.assert_array_equal(part((slice(4, 6), slice(None))), whole[4:6])
  np.testing.assert_array_equal(stacked_part((slice(None), slice(2, 4), slice(None))), np.stack([whole[2:4]] * 2))
