"""Runs of train.py that are killed, stopped and compared: what tests/faults and benchmarks/faults.py share."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

from textgen_jax.tools import verify_resume
from textgen_jax.training import checkpoints

ROOT = pathlib.Path(__file__).parent.parent
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
      accumulation_steps=2,
      log_every_steps=1,
      eval_every_steps=10,
      checkpoint_every_steps=3,
      sample_tokens=0,
    ),
  )
"""
TEXT = 'She sells sea shells by the sea shore, and the shells she sells are sea shells. ' * 30
SAVE_EVERY, EVALUATE_EVERY = 3, 10
KILLS = 5  # of each model, but for the long version
STEPS_A_KILL = 20  # about as far as a run gets before the next one
# Where a run may be when it is ended; `reach` waits for them.
MOMENTS = ('training', 'saving', 'evaluating', 'deleting', 'starting', 'compiling')
PATIENCE_S = 300
SAMPLES = ('--config.training.sample_tokens=20', f'--config.training.sample_every_steps={SAVE_EVERY}')


def environment(directory):
  """Of runs that compile quickly, and once for all that share a directory."""
  return {
    **os.environ,
    'PYTHONPATH': str(ROOT),
    'TEXTGEN_JAX_CACHE': str(directory / 'cache'),
    'JAX_PLATFORMS': 'cpu',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }


class Runs:
  """Starts train.py on workdirs of one model; `whole` is the one that nothing disturbs."""

  def __init__(self, directory, kind, num_steps):
    self.kind, self.num_steps = kind, num_steps
    text = directory / 'text.txt'
    text.write_text(TEXT)
    self.config = directory / f'{kind}.py'
    self.config.write_text(CONFIG.format(model=MODELS[kind], text=str(text), num_steps=num_steps))
    self.environment = environment(directory)
    self.whole = directory / 'whole'
    self.finish(self.whole)

  def argv(self, workdir, *more):
    return ['train.py', f'--config={self.config}', f'--workdir={workdir}', *more]

  def start(self, workdir, *more, script=('train.py',), shell=None, stderr=None, **environment):
    """`shell`: a line that runs the command "$@"."""
    around = ['bash', '-c', shell, 'bash'] if shell else []
    return Process(workdir, [*around, sys.executable, *script, *self.argv(workdir, *more)[1:]], self.environment | environment, stderr)

  def finish(self, workdir):
    """To the end; gives what it said."""
    process = self.start(workdir)
    assert process.wait() == 0, process.said()[-3000:]
    return process.said()


class Process:
  """A command that is under way; its stderr goes to a file, so that it never waits for us."""

  def __init__(self, workdir, command, environment, stderr=None):
    self.workdir = workdir
    self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
    self._popen = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=stderr or self._stderr)
    self.pid, self.poll, self.send = self._popen.pid, self._popen.poll, self._popen.send_signal

  def wait(self):
    return self._popen.wait(timeout=PATIENCE_S)

  def kill(self):
    self._popen.kill()
    return self.wait()

  def said(self):
    self._stderr.seek(0)
    return self._stderr.read().decode(errors='replace')

  def until(self, happened, pause_s=0.002):
    """Whether it happened before the process ended."""
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
      if self.poll() is not None:
        return False
      assert time.monotonic() < deadline, self.said()[-3000:]
      time.sleep(pause_s)
    return True

  def answers(self):
    """Whether its own handler of SIGTERM is in place: before it, Python's start is all that there is to end."""
    try:
      status = pathlib.Path(f'/proc/{self.pid}/status').read_text()
    except OSError:  # no such system: a second is plenty
      time.sleep(1)
      return True
    return int(status.partition('SigCgt:')[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1 == 1


def records(workdir):
  """The whole lines of metrics.jsonl, without what a clock has written."""
  path = workdir / 'metrics.jsonl'
  lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
  found = [json.loads(line) for line in lines if line.endswith(b'\n')]
  return [{name: value for name, value in record.items() if name != 'train/tokens_per_s'} for record in found]


def logged_step(workdir):
  return max((record['step'] for record in records(workdir)), default=0)


def is_scored(workdir, step):
  return any('val/loss' in record and record['step'] == step for record in records(workdir))


def unfinished(workdir):
  """What a process was writing or deleting there."""
  patterns = ('*.tmp', '*/*.tmp', 'checkpoints/*tmp*', 'checkpoints/*.deleted', 'checkpoints/*/*tmp*')
  return [str(path.relative_to(workdir)) for pattern in patterns for path in workdir.glob(pattern)]


def saved_steps(workdir):
  return checkpoints.listed(workdir / 'checkpoints')


def assert_same_step(found, expected, step):
  ours, theirs = verify_resume.stored(found, step), verify_resume.stored(expected, step)
  assert list(ours) == list(theirs)
  for name, x in ours.items():
    y = theirs[name]
    assert (x.dtype, x.shape) == (y.dtype, y.shape), name
    assert x.tobytes() == y.tobytes(), name


def assert_same_end(found, expected):
  """Bit for bit: what is kept, what it scored, what was logged; and nothing unfinished lies about."""
  assert saved_steps(found) == saved_steps(expected)
  ours, theirs = (checkpoints.Checkpoints(workdir, read_only=True) for workdir in (found, expected))
  for step in saved_steps(expected):
    assert ours.problem(step) is None
    assert (ours.is_scored(step), ours.val_loss(step)) == (theirs.is_scored(step), theirs.val_loss(step)), step
    assert_same_step(found, expected, step)
  assert ours.best_steps() == theirs.best_steps()
  assert records(found) == records(expected)  # each step once, to the last digit
  assert unfinished(found) == []


def reach(process, moment, rng):
  """Waits until the run is at a moment of that kind; False where it ended first."""
  workdir = process.workdir
  folder, before = workdir / 'checkpoints', logged_step(workdir)

  def stands(pattern, but=()):
    return any(path.name not in but for path in folder.glob(pattern))

  if moment == 'starting':
    until = time.monotonic() + rng.uniform(0, 4)
    return process.until(process.answers) and process.until(lambda: time.monotonic() > until)
  if moment == 'compiling':
    alive = process.until(lambda: 'all parameters' in process.said())
    time.sleep(rng.uniform(0, 0.4))
    return alive
  if moment == 'evaluating':  # a step is logged, then saved, then scored
    at = (before // EVALUATE_EVERY + 1) * EVALUATE_EVERY
    alive = process.until(lambda: logged_step(workdir) >= at and stands(f'{at}*'))
    time.sleep(rng.uniform(0, 0.05))
    return alive
  after = before + rng.randrange(1, 15)
  if moment == 'sampling':  # compiles for a second or more when it first does
    at = (before // SAVE_EVERY + 1) * SAVE_EVERY
    alive = process.until(lambda: logged_step(workdir) >= at)
    time.sleep(rng.uniform(0, 0.5))
    return alive
  if moment == 'training':
    alive = process.until(lambda: logged_step(workdir) >= after)
    time.sleep(rng.uniform(0, 0.02))
    return alive
  # An earlier process's leftovers aren't this one's save.
  old = {path.name for path in folder.glob('*.*')}
  alive = process.until(lambda: logged_step(workdir) >= min(after, before + SAVE_EVERY))
  if moment == 'saving':
    alive = alive and process.until(lambda: stands('*tmp*', old), pause_s=0)
    time.sleep(rng.choice([0, rng.uniform(0, 0.05)]))
    return alive
  return alive and process.until(lambda: stands('*.deleted', old), pause_s=0)


def stopped(runs, workdir, moment, number, rng, *more):
  """SIGTERM or SIGINT at a moment of that kind; gives what was said and the seconds until the end, or None where it had ended."""
  process = runs.start(workdir, *more)
  if not reach(process, moment, rng):
    assert process.poll() == 0, process.said()[-3000:]
    return None
  began = time.monotonic()
  process.send(number)
  code, seconds, said = process.wait(), time.monotonic() - began, process.said()
  if code == 0:
    return None
  assert code == 128 + number, said[-3000:]
  assert 'Traceback' not in said
  last, name = said.splitlines()[-1], signal.Signals(number).name
  assert said.count('error: ') == 1
  saved = (saved_steps(workdir) or [0])[-1]
  if last != f'error: {name}: nothing was left unsaved':
    assert last == f'error: {name}: step {saved} is saved in {workdir}; the same command goes on from there'
  assert logged_step(workdir) == saved  # each step is logged: none that was finished is lost
  assert not list((workdir / 'checkpoints').glob('*tmp*'))  # the last save has ended
  return said, seconds


def killed(runs, workdir, moment, rng):
  """SIGKILL at a moment of that kind; gives what lay unfinished, or None where the run was over before."""
  fresh = {'JAX_COMPILATION_CACHE_DIR': tempfile.mkdtemp(dir=runs.config.parent)} if moment == 'compiling' else {}
  process = runs.start(workdir, **fresh)
  alive = reach(process, moment, rng)
  ended = process.kill() == -signal.SIGKILL
  if not (alive and ended):
    assert process.poll() in (0, -signal.SIGKILL), process.said()[-3000:]
    return None
  kept = checkpoints.Checkpoints(workdir, read_only=True) if saved_steps(workdir) else None
  for step in saved_steps(workdir):  # what bears a step's name is whole at any moment
    assert kept.problem(step) is None
  # What was saved two intervals ago is on disk: a save waits for the one before.
  assert ([0] + saved_steps(workdir))[-1] > logged_step(workdir) - 1 - 2 * SAVE_EVERY
  return unfinished(workdir)


def kill_again_and_again(runs, workdir, moments, rng=None):
  """A run that is killed at each of the moments in turn and then left to end; gives a line of history a kill."""
  rng, history = rng or random.Random(f'{runs.kind} {len(moments)}'), []
  for moment in moments:
    left = killed(runs, workdir, moment, rng)
    history.append({'moment': moment, 'logged': logged_step(workdir), 'saved': saved_steps(workdir)[-1:], 'unfinished': left})
  runs.finish(workdir)
  return history
