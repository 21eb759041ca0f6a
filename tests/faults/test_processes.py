"""What happens to one of two processes ends both: in a stated time, with a stated code."""

import signal

import fault_runs
import process_runs
import pytest

LONG = '--config.training.num_steps=100000'
HANG_S = 5
FAILED = 5


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
  made = process_runs.Cluster(tmp_path_factory.mktemp('processes'), 'transformer', fsdp=1)
  made.finish(made.directory / 'first', 2)  # what is compiled is kept
  return made


@pytest.fixture
def running(request, cluster, tmp_path):
  """Two processes in the middle of training; a parameter of the fixture is more flags."""
  more = [LONG, f'--hang_timeout_s={HANG_S}', '--config.training.eval_every_steps=0', *getattr(request, 'param', ())]
  started = cluster.start(tmp_path / 'run', 2, *more)
  assert started[0].until(lambda: fault_runs.logged_step(tmp_path / 'run') >= 15), '\n'.join(one.said()[-2000:] for one in started)
  yield started
  for one in started:
    if one.poll() is None:
      one.send(signal.SIGCONT)
      one.kill()


@pytest.mark.parametrize('victim', [0, 1])
def test_a_kill_of_one_ends_the_other_within_10_s(running, victim):
  other = running[1 - victim]
  running[victim].kill()
  code, seconds = process_runs.seconds_until_end(other)
  assert code == FAILED, other.said()[-3000:]
  assert seconds < 10, other.said()[-3000:]
  assert 'lost' in other.said()
  assert 'most recent call first' in other.said()


def test_a_process_that_stands_still_ends_the_other_within_the_watchdogs_time(running):
  process_runs.stop_for_good(running[1])
  code, seconds = process_runs.seconds_until_end(running[0])
  assert code == FAILED, running[0].said()[-3000:]
  assert seconds < HANG_S + 5, running[0].said()[-3000:]
  assert f'--hang_timeout_s={HANG_S}' in running[0].said()
  assert 'most recent call first' in running[0].said()


def test_an_exception_in_one_ends_the_other_within_5_s(cluster, tmp_path):
  started = cluster.start(tmp_path / 'run', 2, LONG, script=str(fault_runs.ROOT / 'tests' / 'raising_process.py'))
  code = started[1].wait()
  other, seconds = process_runs.seconds_until_end(started[0])
  assert code == 1, started[1].said()[-3000:]
  assert 'ValueError: no such row' in started[1].said(), started[1].said()[-3000:]
  assert other == FAILED, started[0].said()[-3000:]
  assert seconds < 5, started[0].said()[-3000:]
  assert 'process 1 of 2 has ended: ValueError: no such row' in started[0].said()


def test_an_absent_process_ends_the_others_at_the_stated_time(cluster, tmp_path):
  for i in (0, 1):
    (alone,) = cluster.start(tmp_path / 'run', 2, '--join_timeout_s=3', only=[i])
    code, seconds = process_runs.seconds_until_end(alone)
    assert code == FAILED, alone.said()[-3000:]
    assert seconds < 3 + 12, alone.said()[-3000:]  # its start, which is no part of the 3
    assert '--join_timeout_s=3' in alone.said()


@pytest.mark.parametrize(
  ('told', 'number', 'running'),
  [(0, signal.SIGTERM, ()), (1, signal.SIGINT, ('--config.training.steps_per_dispatch=4',))],
  indirect=['running'],
)
def test_a_signal_to_one_saves_the_same_step_on_both(running, tmp_path, told, number):
  running[told].send(number)
  codes = [one.wait() for one in running]
  assert codes == [128 + number] * 2, '\n'.join(one.said()[-3000:] for one in running)
  saved = fault_runs.saved_steps(tmp_path / 'run')[-1]
  assert saved == fault_runs.logged_step(tmp_path / 'run')
  for one in running:
    assert f'{number.name}: step {saved} is saved in' in one.said()


def test_a_process_that_lingers_when_all_is_done_ends_well(cluster, tmp_path):
  started = cluster.start(tmp_path / 'run', 2, script=str(fault_runs.ROOT / 'tests' / 'lingering_process.py'))
  assert started[0].wait() == 0, started[0].said()[-3000:]
  code, seconds = process_runs.seconds_until_end(started[1])
  assert code == 0, started[1].said()[-3000:]
  assert seconds < 20, 'it was not aborted: the test is of nothing'


def test_processes_with_other_settings_do_not_begin(cluster, tmp_path):
  port = process_runs.free_port()

  def who(i):
    other = ['--config.optimizer.peak_lr=0.5'] if i else []
    return [f'--coordinator=127.0.0.1:{port}', '--num_processes=2', f'--process_id={i}', *other]

  ours, theirs = cluster.start(tmp_path / 'run', 2, flags=who)
  assert [ours.wait(), theirs.wait()] == [2, 2]
  for one in (ours, theirs):
    assert 'error: process 1 of 2 has optimizer.peak_lr=0.5, and process 0 has 0.01' in one.said(), one.said()[-2000:]
  assert not (tmp_path / 'run').exists()


def test_slurms_environment_is_enough(cluster, tmp_path):
  slurm = {'SLURM_JOB_ID': str(process_runs.free_port()), 'SLURM_STEP_NODELIST': '127.0.0.1', 'SLURM_NTASKS': '2'}
  slurm |= {'SLURM_PROCID': '{i}', 'SLURM_LOCALID': '{i}', 'SLURM_STEP_NUM_NODES': '1'}
  leader, _ = cluster.finish(tmp_path / 'run', 2, flags=lambda i: [], **slurm)
  assert '2 processes, 2 devices' in leader
