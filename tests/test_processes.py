"""Several processes train as one does: the same batches, losses and leaves, and a run moves between numbers of them."""

import json
import os
import socket
import sys
from unittest import mock

import fault_runs
import jax
import numpy as np
import process_runs
import pytest

from textgen_jax import errors, launch, launch_flags, meeting, processes, sharding

# What train.py does before anything else, as process I of N.
JOIN = """
import sys
from textgen_jax import command_line, launch, launch_flags
coordinator, *numbers = sys.argv[1:]
launched = launch_flags.Launch(coordinator, *map(int, numbers))
launched.check()
sys.exit(command_line.run(lambda argv: launch.join(launched), []))
"""


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
    ({'hang_timeout_s': 99999999999}, '--hang_timeout_s=99999999999 is above 1000000000'),
    ({'join_timeout_s': 99999999999}, '--join_timeout_s=99999999999 is above 1000000000'),
    ({'coordinator': 'host:1', 'num_processes': 2**31, 'process_id': 0}, '--num_processes=2147483648 is above 1000000'),
  ],
)
def test_flags_that_do_not_go_together(given, told):
  with pytest.raises(errors.UserError) as error:
    launch_flags.Launch(**given).check()
  assert str(error.value) == told


@pytest.mark.parametrize(
  ('address', 'told'),
  [
    ('127.0.0.1:८४७६', " isn't HOST:PORT"),  # digits to int(), and a crash of JAX's library
    ('127.0.0.1:+1', " isn't HOST:PORT"),
    ('a/b:84', " isn't HOST:PORT"),
    ('127.0.0.1:0', ': the port is not in [1, 65535]'),
    ('127.0.0.1:65536', ': the port is not in [1, 65535]'),
    ('127.0.0.1:' + '9' * 5000, ': the port is not in [1, 65535]'),
    ('http://127.0.0.1:8476', ': HOST:PORT has no scheme, http://'),
    ('a b:84', ': HOST:PORT has no spaces'),
    ('a:84\n', ': HOST:PORT has no spaces'),
    ('::1:28476', ': an IPv6 address is written in brackets, as in [::1]:8476'),
    ('[host]:84', ": 'host' in brackets is not an IPv6 address"),
    ('[]:84', ": '' in brackets is not an IPv6 address"),
  ],
)
def test_addresses_that_cannot_be(address, told):
  with pytest.raises(errors.UserError) as error:
    launch_flags.check_address('--coordinator', address)
  assert str(error.value) == f'--coordinator={address!r}{told}'


@pytest.mark.parametrize('address', ['[::1]:8476', '[fe80::1%eth0]:8476', 'my_host-1.example:65535', '10.0.0.1:1'])
def test_addresses_that_can_be(address):
  launch_flags.check_address('--coordinator', address)


SLURM = {'SLURM_JOB_ID': '5', 'SLURM_STEP_NODELIST': 'x', 'SLURM_NTASKS': '2', 'SLURM_PROCID': '0', 'SLURM_LOCALID': '0'}
OPEN_MPI = {'OMPI_MCA_orte_hnp_uri': '0.0;tcp://10.0.0.1:1', 'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_COMM_WORLD_RANK': '0'}


@pytest.mark.parametrize(
  ('launcher', 'damage', 'told'),
  [
    (SLURM, {'SLURM_NTASKS': 'abc'}, "'abc'"),
    (SLURM, {'SLURM_PROCID': '2'}, 'process 2 of 2'),
    (SLURM, {'SLURM_NTASKS': '2147483648'}, 'process 0 of 2147483648'),
    (SLURM, {'JAX_COORDINATOR_PORT': '८४'}, "isn't HOST:PORT"),
    (OPEN_MPI, {'OMPI_MCA_orte_hnp_uri': 'junk'}, "'junk'"),
    (OPEN_MPI, {'OMPI_COMM_WORLD_SIZE': None}, "'OMPI_COMM_WORLD_SIZE' is not set"),
    (OPEN_MPI, {'OMPI_COMM_WORLD_LOCAL_RANK': None}, "'OMPI_COMM_WORLD_LOCAL_RANK' is not set"),
  ],
)
def test_a_launchers_damaged_environment(monkeypatch, launcher, damage, told):
  for name, value in {**launcher, **damage}.items():
    monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *place, **how: os.environ['OMPI_COMM_WORLD_LOCAL_RANK'])  # as JAX's does
  monkeypatch.setattr(launch, '_catch_aborts', lambda: None)
  monkeypatch.setattr(launch, '_place', None)
  with pytest.raises(errors.UserError, match="the launcher's") as error:
    launch.join(launch_flags.Launch())
  assert told in str(error.value)
  if 'HOST' not in told:
    assert '--num_processes=1 says that this one is alone' in str(error.value)


def at(coordinator, process_id=0):
  return launch_flags.Place(coordinator, 2, process_id, by_hand=True)


def test_a_taken_port_is_named():
  with socket.socket() as listening:
    listening.bind(('127.0.0.1', 0))
    listening.listen()
    port = listening.getsockname()[1]
    with pytest.raises(errors.MachineFailed, match=f'^--coordinator=127.0.0.1:{port}: port {port} is taken'):
      meeting.check_port(at(f'127.0.0.1:{port}'))
    meeting.check_port(at(f'127.0.0.1:{port}', 1))  # process 0's alone
    assert 'process 0 is there' in meeting.why_late(at(f'127.0.0.1:{port}'), '')
  meeting.check_port(at(f'127.0.0.1:{port}'))
  assert 'process 0 is not there (Connection refused)' in meeting.why_late(at(f'127.0.0.1:{port}'), '')


def test_the_librarys_last_words_are_held_and_told_in_ours(capfd):
  for words, told in (
    ('ALREADY_EXISTS: Aborted connect attempt', 'two processes of the run have the same --process_id=1'),
    ('INVALID_ARGUMENT: Unexpected task registered with task=1', '--process_id=1 of --num_processes=2 is not among those'),
    ('INTERNAL: another thing', None),
  ):
    heard = meeting.Overheard()
    os.write(2, f'a warning\nF1128 03:57:45.276104 1 client.h:80] {words}\n'.encode())
    os.write(2, b'*** Check failure stack trace: ***\n')
    why = meeting.why_refused(at('host:1', 1), heard.stop())
    assert told is why is None or told in why
    assert capfd.readouterr().err == 'a warning\n'
    heard.let_out()
    assert capfd.readouterr().err.endswith('stack trace: ***\n')
    os.write(2, b'as before\n')
    assert capfd.readouterr().err == 'as before\n'


def joining(tmp_path, *who):
  command = [sys.executable, '-c', JOIN, *map(str, who)]
  return fault_runs.Process(tmp_path, command, fault_runs.environment(tmp_path))


def test_who_waits_too_long_tells_where_it_was_and_whether_the_name_is_known(tmp_path):
  alone = joining(tmp_path, 'no.such.host.invalid:28476', 2, 1, 1)
  assert alone.wait() == 5, alone.said()
  last = alone.said().splitlines()[-1]  # no stacks
  assert last.startswith('error: not all 2 processes have come within --join_timeout_s=1 to --coordinator=no.such.host.invalid:28476')
  assert "where this one is --process_id=1: the name 'no.such.host.invalid' isn't known here" in last


@pytest.mark.parametrize(
  ('others', 'told'),
  [
    ([(3, 1), (3, 1)], 'error: two processes of the run have the same --process_id=1'),
    ([(5, 4)], 'error: --process_id=4 of --num_processes=5 is not among those that process 0, at {}, expects'),
  ],
)
def test_processes_that_disagree_on_who_they_are(tmp_path, others, told):
  port = process_runs.free_port()
  coordinator = f'127.0.0.1:{port}'
  leader = joining(tmp_path, coordinator, 3, 0, 100)
  assert leader.until(lambda: listens(port), pause_s=0.1), leader.said()
  started = [joining(tmp_path, coordinator, *who, 100) for who in others]
  leader.until(lambda: any(one.poll() is not None for one in started), pause_s=0.1)
  (refused,) = [one for one in started if one.poll() is not None]
  for one in (leader, *started):
    one.kill()
  assert refused.poll() == 2, refused.said()
  assert refused.said().startswith(told.format(coordinator)), refused.said()
  assert len(refused.said().splitlines()) == 1  # none of the library's


def listens(port):
  with socket.socket() as asking:
    return asking.connect_ex(('127.0.0.1', port)) == 0


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
