"""Killed at any moment and started again, a run ends bit for bit where it would have."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from textgen_jax import trees

ROOT = pathlib.Path(__file__).parent.parent
KILLS = int(os.environ.get('TEXTGEN_JAX_KILLS', '3'))  # of each model
NUM_STEPS = max(60, 30 * KILLS)  # so that kills still find the run under way
MODELS = {
  'transformer': "transformer.TransformerConfig(dim=16, num_layers=1, num_heads=2, dropout=0.1), 'random'",
  'lstm': "lstm.LSTMConfig(dim=16, num_layers=1, dropout=0.1), 'contiguous'",
}
CONFIG = """
from textgen_jax import experiment
from textgen_jax.data import corpora
from textgen_jax.models import lstm, transformer
from textgen_jax.training import optimizer


def get_config():
  model, windows = {model}
  return experiment.Experiment(
    data=corpora.DataConfig(path={text!r}),
    model=model,
    optimizer=optimizer.OptimizerConfig(peak_lr=1e-2, warmup_steps=5),
    training=experiment.TrainingConfig(
      num_steps={num_steps},
      batch_size=4,
      sequence_length=8,
      windows=windows,
      log_every_steps=1,
      eval_every_steps=20,
      checkpoint_every_steps=3,
      sample_tokens=0,
    ),
  )
"""


class Runs:
  """Starts `train.py` on workdirs of one model."""

  def __init__(self, directory, kind):
    self.directory = directory
    text = directory / 'text.txt'
    text.write_text('She sells sea shells by the sea shore, and the shells she sells are sea shells. ' * 30)
    self.config = directory / f'{kind}.py'
    self.config.write_text(CONFIG.format(model=MODELS[kind], text=str(text), num_steps=NUM_STEPS))
    self.environment = {
      **os.environ,
      'TEXTGEN_JAX_CACHE': str(directory / 'cache'),
      'JAX_PLATFORMS': 'cpu',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    self.whole = directory / 'whole'
    self.finish(self.whole)

  def start(self, workdir):
    command = [sys.executable, 'train.py', f'--config={self.config}', f'--workdir={workdir}']
    return subprocess.Popen(
      command, cwd=ROOT, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors='replace'
    )

  def finish(self, workdir):
    process = self.start(workdir)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    return said


@pytest.fixture(scope='module', params=list(MODELS))
def runs(request, tmp_path_factory):
  return Runs(tmp_path_factory.mktemp(request.param), request.param)


def losses(workdir):
  """(step, loss) of each whole line, in the file's order."""
  found = []
  path = workdir / 'metrics.jsonl'
  for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
    if line.endswith('\n') and 'train/loss' in line:
      record = json.loads(line)
      found.append((record['step'], record['train/loss']))
  return found


def logged_step(workdir):
  found = losses(workdir)
  return found[-1][0] if found else 0


def steps(workdir):
  return sorted(int(path.name) for path in (workdir / 'checkpoints').glob('*') if path.name.isdecimal())


def stored(workdir, step):
  """Every array of a checkpoint: params, moments, counts, key, carry."""
  read = ocp.StandardCheckpointer().restore
  return trees.named_leaves({item: read(workdir.absolute() / 'checkpoints' / str(step) / item) for item in ('params', 'state')})


def assert_same_end(found, expected):
  assert steps(found)[-1] == steps(expected)[-1] == NUM_STEPS
  for (name, x), (_, y) in zip(stored(found, NUM_STEPS), stored(expected, NUM_STEPS), strict=True):
    assert x.dtype == y.dtype, name
    np.testing.assert_array_equal(x, y, err_msg=name)
  assert losses(found) == losses(expected)  # each step once, to the last digit
  # What is kept, and which of it is the best, is the same too; nothing is left half-written.
  assert steps(found) == steps(expected)
  assert not list((found / 'checkpoints').glob('*tmp*'))


def wait_for(process, happened):
  """False where the process ended first."""
  deadline = time.monotonic() + 120
  while not happened():
    if process.poll() is not None:
      return False
    assert time.monotonic() < deadline
    time.sleep(0.002)
  return True


def kill(process, workdir, moment, rng):
  """Sends SIGKILL at a random moment of a kind; False where the run was over before."""
  if moment == 'starting':
    delay = time.monotonic() + rng.uniform(0, 5)
    alive = wait_for(process, lambda: time.monotonic() > delay)
  elif moment == 'saving':  # the folder bears another name until the save is whole
    skipped = set((workdir / 'checkpoints').glob('*tmp*')) if (workdir / 'checkpoints').exists() else set()
    after = logged_step(workdir) + rng.randrange(1, 15)
    alive = wait_for(
      process, lambda: logged_step(workdir) >= after and set((workdir / 'checkpoints').glob('*tmp*')) - skipped
    )
    time.sleep(rng.choice([0, rng.uniform(0, 0.05)]))
  else:
    after = min(logged_step(workdir) + rng.randrange(1, 20), NUM_STEPS - 1)
    alive = wait_for(process, lambda: logged_step(workdir) >= after)
    time.sleep(rng.uniform(0, 0.02))
  process.kill()
  process.communicate()
  return alive and process.returncode == -signal.SIGKILL


def test_killed_at_random_moments(runs, tmp_path):
  rng = random.Random(f'{runs.config.stem} {KILLS}')
  workdir = tmp_path / 'killed'
  history = []
  for n in range(KILLS):
    moment = ('training', 'saving', 'starting')[n % 3]
    killed = kill(runs.start(workdir), workdir, moment, rng)
    history.append(f'{moment}: {"killed" if killed else "over"}, logged {logged_step(workdir)}, saved {steps(workdir)[-1:]}')
  print(*history, sep='\n')
  assert sum('killed' in line for line in history) > KILLS // 2, history
  runs.finish(workdir)
  assert_same_end(workdir, runs.whole)


def test_stopped_by_a_signal(runs, tmp_path):
  number, exit_code = {'transformer': (signal.SIGTERM, 143), 'lstm': (signal.SIGINT, 130)}[runs.config.stem]
  workdir = tmp_path / 'stopped'
  process = runs.start(workdir)
  assert wait_for(process, lambda: logged_step(workdir) >= 10)
  process.send_signal(number)
  _, said = process.communicate(timeout=120)
  assert process.returncode == exit_code, said
  done = logged_step(workdir)
  assert 10 <= done < NUM_STEPS
  assert steps(workdir)[-1] == done  # the last finished step
  assert said.splitlines()[-1].startswith(f'error: {number.name}: step {done} is saved')
  assert 'Traceback' not in said
  assert f'going on from step {done}' in runs.finish(workdir)
  assert_same_end(workdir, runs.whole)
