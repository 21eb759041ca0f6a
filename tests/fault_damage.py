"""Damage done to a finished run's newest checkpoint, and how the commands take it: what tests/faults and benchmarks/faults.py share."""

import contextlib
import io
import pathlib
import shutil

import fault_runs
import jax

import sample
import train
from textgen_jax.tools import evaluate
from textgen_jax.training import integrity

STEPS = (2, 4, 6)  # that the run keeps; its losses fall, so the last is the best too
SETTINGS = [
  '--config.training.num_steps=6',
  '--config.optimizer.schedule_steps=6',
  '--config.training.checkpoint_every_steps=2',
  '--config.training.eval_every_steps=2',
  '--config.training.keep_checkpoints=3',
]


def files(folder, sealed=True):
  """A step's files that its manifest vouches for, the manifest among them; or the others."""
  found = sorted(path for path in folder.rglob('*') if path.is_file() and path.name != 'score.json')
  return [path for path in found if (path.name not in integrity.UNSEALED) == sealed]


def flip(path, rng):
  """One bit, anywhere."""
  data = bytearray(path.read_bytes())
  data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  path.write_bytes(data)


def truncate(path, rng):
  data = path.read_bytes()
  path.write_bytes(data[: rng.randrange(len(data))])


def delete(path, rng):
  del rng
  path.unlink()


def told(command, argv):
  """A command's exit code, its stdout and its stderr."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = command(argv)
  return code, out.getvalue(), err.getvalue()


class Damaged:
  """A copy of a finished run whose newest step is damaged, and what each command makes of it.

  Each method gives what is wrong with the command's answer; '' is as promised.
  """

  def __init__(self, whole, copy, argv):
    self.whole, self.copy = whole, copy
    self.argv = [*argv, f'--workdir={copy}', *SETTINGS]
    self.reset()
    # What the commands say where nothing is damaged, of the newest step and of the one before.
    self.whole_scores = {step: self._score(str(step)) for step in STEPS}

  def reset(self):
    shutil.rmtree(self.copy, ignore_errors=True)
    shutil.copytree(self.whole, self.copy, symlinks=True)

  def folder(self, step=STEPS[-1]):
    return self.copy / 'checkpoints' / str(step)

  def _score(self, checkpoint):
    code, out, _ = told(evaluate.main, ['evaluate', f'--workdir={self.copy}', f'--checkpoint={checkpoint}'])
    return out if code == 0 else code

  def named(self, path, err):
    """Whether the damaged step and file stand on a line of stderr."""
    name = path.relative_to(self.folder()).as_posix()
    return any(f'{self.folder()} is skipped: ' in line and name in line for line in err.splitlines())

  def reading(self, command, path, *more):
    """Sampling and evaluating read params and description alone: what they don't read may be damaged."""
    code, out, err = told(command, ['command', f'--workdir={self.copy}', *more])
    if code:
      return f'exit code {code}: {err[-300:]}'
    unread = path.relative_to(self.folder()).as_posix().startswith('state/')
    if self.named(path, err) == unread:
      return f'{path} was {"blamed" if unread else "not named"}: {err[-300:]}'
    if command is evaluate.main and out != self.whole_scores[STEPS[-1] if unread else STEPS[-2]]:
      return f'scored another step: {out}'
    return ''

  def sampling(self, path):
    return self.reading(sample.main, path, '--max_new_tokens=1', '--temperature=0')

  def evaluating(self, path):
    return self.reading(evaluate.main, path)

  def restoring(self, path):
    """A training that asks for no more than the step before: it goes back to it."""
    code, _, err = told(train.main, [*self.argv, f'--config.training.num_steps={STEPS[-2]}'])
    return self._judge(path, code, err)

  def training(self, path):
    """The step that was damaged is trained anew."""
    return self._judge(path, *told(train.main, self.argv)[::2])

  def _judge(self, path, code, err):
    if code:
      return f'exit code {code}: {err[-300:]}'
    if not self.named(path, err):
      return f'{path} was not named: {err[-300:]}'
    if f'going on from step {STEPS[-2]} of' not in err:
      return f'went on from elsewhere: {err[-300:]}'
    return ''


def make(directory):
  """A run of three steps that are kept, in this process."""
  text, config = directory / 'text.txt', directory / 'lstm.py'
  text.write_text(fault_runs.TEXT)
  config.write_text(fault_runs.CONFIG.format(model=fault_runs.MODELS['lstm'], text=str(text), num_steps=STEPS[-1]))
  argv, whole = ['train.py', f'--config={config}'], directory / 'whole'
  code, _, err = told(train.main, [*argv, f'--workdir={whole}', *SETTINGS])
  assert code == 0, err
  return Damaged(whole, directory / 'copy', argv)


def compile_cache():
  return [path for path in pathlib.Path(jax.config.values['jax_compilation_cache_dir']).iterdir() if path.is_file()]
