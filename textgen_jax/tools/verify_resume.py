"""Kills a run of your own configuration at random moments, and sees whether it ends as one that was left alone.

  python -m textgen_jax.tools.verify_resume --config=configs/shakespeare_char.py --kills=3 --num_steps=100 [--config.x=...]

trains once to the end and once with SIGKILL in turn at a random step, while a checkpoint is being written, and during
start-up, each time going on with the same command; then compares every array of the last checkpoint and every logged
loss, bit by bit. Exit code 0 where all are equal, 1 where one isn't. Every step is logged and about ten checkpoints
are written, unless --config.training.* says otherwise. All of it happens in a temporary directory.
"""

from textgen_jax import signals

if __name__ == '__main__':
  signals.watch()  # before anything that takes its time to import

import contextlib
import dataclasses
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags

from textgen_jax import command_line, errors, trees
from textgen_jax import experiment as experiment_lib
from textgen_jax.training import metrics, progress

# What train.py does, which an installed package hasn't got.
TRAIN = """
import sys
from textgen_jax import allocator

allocator.keep_memory()
from textgen_jax import command_line

def main(argv):
  experiment, workdir = command_line.parse_experiment(argv)
  from textgen_jax import compilation
  compilation.keep_compiled()
  compilation.split_cores(experiment)
  from textgen_jax import trainer
  trainer.train(experiment, workdir)

sys.exit(command_line.run(main, sys.argv))
"""
MOMENTS = ('training', 'saving', 'starting')


def main(argv: Sequence[str]) -> int:
  return command_line.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
  overrides = [arg for arg in argv[1:] if arg.lstrip('-').startswith('config.')]
  values = flags.FlagValues()
  flags.DEFINE_string('config', None, 'a file of configs/; --config.field=value changes one of its fields', flag_values=values)
  flags.DEFINE_integer('kills', 3, 'how often the run is killed', flag_values=values)
  flags.DEFINE_integer('num_steps', 60, 'how long the run is', flag_values=values)
  flags.DEFINE_integer('seed', 0, 'of the moments', flag_values=values)
  if not command_line.parsed(values, [arg for arg in argv if arg not in overrides], __doc__):
    return
  for name, lowest in (('kills', 1), ('num_steps', 2), ('seed', 0)):
    if getattr(values, name) < lowest:
      raise errors.UserError(f'--{name}={getattr(values, name)} is below {lowest}')
  every = -(-values.num_steps // 10)
  settings = {'num_steps': values.num_steps, 'log_every_steps': 1, 'checkpoint_every_steps': every, 'sample_every_steps': 0}
  own = [f'--config.training.{name}={value}' for name, value in settings.items()]
  configuration = [*([f'--config={values.config}'] if values.config else []), *own, *overrides]
  experiment, _ = command_line.parse_experiment(['verify_resume', '--workdir=-', *configuration])
  experiment_lib.check(experiment)
  signals.unwatch()  # what is under way is ended and cleared away
  with tempfile.TemporaryDirectory(prefix='verify_resume_') as directory:
    verify(Runs(configuration), pathlib.Path(directory), values.kills, experiment.training.num_steps, random.Random(values.seed))


@dataclasses.dataclass(frozen=True)
class Runs:
  """How to start a run on a workdir."""

  configuration: list[str]  # flags
  environment: dict[str, str] | None = None  # None: this process's own

  @contextlib.contextmanager
  def started(self, workdir: pathlib.Path, expected: Sequence[int]) -> Iterator[subprocess.Popen[bytes]]:
    """The process, waited for at the end; RunError with its last words where its exit code isn't one of those `expected`."""
    said = workdir.with_suffix('.stderr')  # a pipe that nobody reads would stop it
    command = [sys.executable, '-c', TRAIN, *self.configuration, f'--workdir={workdir}']
    with said.open('wb') as stderr:
      process = subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
      yield process
      code = process.wait()
    finally:  # also where we are interrupted
      process.kill()
      process.wait()
    if code not in expected:
      last = (said.read_text(errors='replace').strip().splitlines() or ['nothing'])[-1][:200]
      raise errors.RunError(f'the run ended by itself with exit code {code}, and said: {last}')

  def finish(self, workdir: pathlib.Path) -> float:
    """Trains to the end, and gives the seconds before the first step was logged."""
    began, step = time.monotonic(), last_step(workdir)
    with self.started(workdir, [0]) as process:
      _wait(process, lambda: last_step(workdir) > step)
      seconds = time.monotonic() - began
    return seconds


def verify(runs: Runs, directory: pathlib.Path, kills: int, num_steps: int, rng: random.Random) -> None:
  """Prints what it does, and raises RunError where the run that was killed ends otherwise."""
  whole, killed = directory / 'whole', directory / 'killed'
  progress.say(f'training {num_steps} steps without a break')
  start_s = runs.finish(whole)
  print(f'trained {num_steps} steps without a break', flush=True)
  hits = 0
  for n, after in enumerate(sorted(rng.sample(range(num_steps), min(kills, num_steps)))):
    moment = MOMENTS[n % len(MOMENTS)]
    progress.say(f'going on from step {last_step(killed)}, to be killed after step {after}, while {moment}')
    hit = kill(runs, killed, moment, after, start_s, rng)
    hits += hit
    print(f'{"killed" if hit else "it had ended before it was killed"} while {moment}, at step {last_step(killed)}', flush=True)
  if not hits:
    raise errors.RunError(f'the run ended before each kill, so nothing was verified: --num_steps={num_steps} is too few')
  runs.finish(killed)
  print(f'went on to step {last_step(killed)}', flush=True)
  found = difference(whole, killed, num_steps)
  if found:
    raise errors.RunError(f'the run that was killed is another one: {found}')
  print('every array of the last checkpoint and every logged loss are the same to the bit')


def kill(runs: Runs, workdir: pathlib.Path, moment: str, after: int, start_s: float, rng: random.Random) -> bool:
  """Starts the run and sends SIGKILL at a random moment of a kind; False where it ended before.

  Args:
    runs: starts it.
    workdir: where it goes on.
    moment: one of `MOMENTS`.
    after: the first step that may be killed, but while starting.
    start_s: how long a start takes.
    rng: draws the moment.
  """
  saved = workdir / 'checkpoints'
  with runs.started(workdir, [0, -signal.SIGKILL]) as process:
    if moment == 'starting':
      deadline = time.monotonic() + rng.uniform(0, start_s)
      _wait(process, lambda: time.monotonic() > deadline)
    elif moment == 'saving':  # a step's folder bears another name until the save is whole
      stale = set(saved.glob('*tmp*'))
      _wait(process, lambda: last_step(workdir) >= after and bool(set(saved.glob('*tmp*')) - stale))
      time.sleep(rng.choice([0.0, rng.uniform(0, 0.05)]))
    else:
      _wait(process, lambda: last_step(workdir) >= after)
      time.sleep(rng.uniform(0, 0.02))
    process.kill()
  return process.returncode == -signal.SIGKILL


def _wait(process: subprocess.Popen[bytes], happened: Callable[[], bool]) -> None:
  """Until it happened, or the process ended."""
  while process.poll() is None and not happened():
    time.sleep(0.005)


def losses(workdir: pathlib.Path) -> list[tuple[int, Any]]:
  """(step, loss) of each record, in the log's order."""
  return [(line['step'], line['train/loss']) for line in metrics.read(workdir / 'metrics.jsonl') if 'train/loss' in line]


def last_step(workdir: pathlib.Path) -> int:
  return max((step for step, _ in losses(workdir)), default=0)


def stored(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
  """Every array of a checkpoint by name: params, moments, counts, key, carry."""
  checkpointer, here = ocp.StandardCheckpointer(), jax.sharding.SingleDeviceSharding(jax.devices()[0])

  def read(path: pathlib.Path) -> Any:
    """Onto one device: the run may have had others than this process."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), checkpointer.metadata(path).item_metadata.tree)
    return checkpointer.restore(path, shapes)

  trees_of = {item: read(workdir.absolute() / 'checkpoints' / str(step) / item) for item in ('params', 'state')}
  return {name: np.asarray(leaf) for name, leaf in trees.named_leaves(trees_of)}


def difference(whole: pathlib.Path, killed: pathlib.Path, step: int) -> str:
  """The first difference in words; '' where there is none."""
  expected, found = stored(whole, step), stored(killed, step)
  for name in {**expected, **found}:
    if name not in expected or name not in found:
      return f'{name} stands in one of the checkpoints of step {step} alone'
    x, y = expected[name], found[name]
    if x.dtype != y.dtype or x.shape != y.shape or x.tobytes() != y.tobytes():
      return f'{name} differs in the checkpoints of step {step}'
  for one, other in zip(losses(whole), losses(killed), strict=False):
    if one != other:
      return f'the loss of step {one[0]} was {one[1]}, and step {other[0]} had {other[1]}'
  if len(losses(whole)) != len(losses(killed)):
    return f'{len(losses(whole))} losses were logged, and {len(losses(killed))}'
  return ''


if __name__ == '__main__':
  sys.exit(main(sys.argv))
