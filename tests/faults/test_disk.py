"""Disks that fill, that can't be written, and workdirs that go away: told in one line, and the run goes on when there is room."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import fault_damage
import fault_runs
import pytest

import train
from textgen_jax.training import metrics

SCRIPT = pathlib.Path(fault_runs.__file__).with_name('train_on_small_disks.py')


def run_script(tmp_path_factory, how, *around):
  directory = tmp_path_factory.mktemp(how)
  paths = os.pathsep.join((str(fault_runs.ROOT), str(SCRIPT.parent)))
  environment = {**os.environ, 'PYTHONPATH': paths, 'TEXTGEN_JAX_CACHE': str(directory / 'cache'), 'JAX_PLATFORMS': 'cpu'}
  command = [*around, sys.executable, str(SCRIPT), str(directory), how]
  process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
  assert process.returncode == 0, process.stderr[-3000:]  # it compares ends with the undisturbed run's
  return directory, json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def mounted(tmp_path_factory):
  probe = ['unshare', '-rm', 'sh', '-c', f'mount -t tmpfs -o size=6m probe {tmp_path_factory.mktemp("probe")}']
  try:
    allowed = subprocess.run(probe, capture_output=True).returncode == 0
  except OSError:
    allowed = False
  if not allowed:
    pytest.skip('no file system may be mounted here; the rows that limit the size of files stand for these')
  return run_script(tmp_path_factory, 'mount', 'unshare', '-rm')


@pytest.fixture(scope='module')
def limited(tmp_path_factory):
  return run_script(tmp_path_factory, 'limit')


def last_line(found):
  assert 'Traceback' not in found['err']
  assert found['err'].count('error: ') == 1
  line = found['err'].splitlines()[-1]
  assert line.startswith('error: ')
  assert len(line) <= 300
  return line


@pytest.mark.parametrize('row', ['a checkpoint', 'everything'])
def test_a_disk_that_fills_while_training(row, mounted):
  directory, found = mounted
  for attempt in (found[row], found[row]['again']):
    assert attempt['code'] == 5
    reason = f'{directory}/disk/{row}/checkpoints/6: the checkpoint could not be saved: No space left on device'
    assert reason in last_line(attempt).replace('checkpoints/9:', 'checkpoints/6:')
    assert attempt['good'][0] == 3  # what was saved before holds
    assert attempt['unfinished'] == []
  assert found[row]['end']['code'] == 0
  assert 'going on from step' in found[row]['end']['err']


def test_a_disk_that_is_full_from_the_start(mounted):
  directory, found = mounted
  assert found['full from the start']['code'] == 5
  assert f'{directory}/disk/new' in last_line(found['full from the start'])
  assert 'No space left on device' in last_line(found['full from the start'])


def test_a_compile_cache_that_is_full_ends_no_run(mounted):
  assert mounted[1]['compile cache']['code'] == 0


def test_a_workdir_that_may_only_be_read(mounted):
  directory, found = mounted
  for row, name in (('read-only', 'run/lock'), ('read-only, new', 'new')):
    assert found[row]['code'] == 5
    assert last_line(found[row]) == f'error: {directory}/ro/{name}: Read-only file system'
  assert (found['read-only']['sample'], bool(found['read-only']['text'])) == (0, True)


def test_files_that_may_not_grow(limited):
  directory, found = limited
  row = found['limit']
  assert row['code'] == 5
  assert f'{directory}/limited/checkpoints/' in last_line(row)
  assert last_line(row).endswith(': the checkpoint could not be saved: File too large')
  assert (row['good'][:1], row['unfinished']) == ([3], [])
  assert row['end']['code'] == 0


def test_a_log_that_cannot_be_written(limited):
  directory, found = limited
  row = found['log']
  assert (row['code'], row['torn']) == (5, True)
  assert last_line(row) == f'error: {directory}/log: File too large'
  assert (row['good'], row['unfinished']) == ([3, 6], [])


def test_a_log_that_is_a_directory(runs_of, tmp_path, quickly):
  runs = runs_of('lstm')
  (tmp_path / 'run' / 'metrics.jsonl').mkdir(parents=True)
  code, _, err = fault_damage.told(train.main, runs.argv(tmp_path / 'run'))
  assert code == 5
  assert last_line({'err': err}) == f'error: {tmp_path}/run/metrics.jsonl: Is a directory'


@pytest.mark.parametrize('step', [7, 10, 12])  # between saves, while it is saved and scored, after the last save
def test_a_workdir_that_is_deleted_under_the_run(step, runs_of, tmp_path, quickly, monkeypatch):
  write, name = metrics.Writer.write, 'val/loss' if step == 12 else 'train/loss'

  def write_and_delete(self, at, values):
    write(self, at, values)
    if at == step and name in values:
      time.sleep(step == 7)
      shutil.rmtree(tmp_path / 'run', ignore_errors=True)

  monkeypatch.setattr(metrics.Writer, 'write', write_and_delete)
  argv = runs_of('lstm').argv(tmp_path / 'run', '--config.training.num_steps=12')
  code, _, err = fault_damage.told(train.main, argv)
  assert code == 5
  line = last_line({'err': err})
  # Where a save was under way it may be what notices.
  gone, failed = f'error: {tmp_path}/run is gone: ', f'error: {tmp_path}/run/checkpoints/'
  assert line.startswith(gone) or (step > 7 and line.startswith(failed) and 'the checkpoint could not be saved' in line)
  assert fault_runs.unfinished(tmp_path / 'run') == []
