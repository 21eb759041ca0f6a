"""Kills, damages and stops runs many times over, and tells what was done and what was seen: the long version of tests/faults.

  python benchmarks/faults.py [--kills=100] [--flips=200] [--signals=20] [--gigabytes=1] [--output=benchmarks/results/DATE-faults.md]

Runs are of train.py itself, on CPU, both models, with dropout and accumulation; the LSTM carries its state. Each resumed run is compared
with one that nothing disturbed: parameters, moments, random key, carry, scores and every logged number, bit for bit. Where something isn't
as promised the script tells what and exits with 1.
"""

import argparse
import collections
import datetime
import importlib.metadata
import itertools
import os
import pathlib
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import fault_damage  # noqa: E402
import fault_runs  # noqa: E402

from textgen_jax.tools import verify_resume  # noqa: E402
from textgen_jax.training import checkpoints, health, integrity, state  # noqa: E402

SIGNAL_MOMENTS = (*fault_runs.MOMENTS, 'sampling')
Row = tuple[str, str, str, bool]  # what was done, how often, what was seen, whether it is as promised


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  for name, default in (('kills', 100), ('flips', 200), ('signals', 20), ('seed', 0)):
    parser.add_argument(f'--{name}', type=int, default=default)
  parser.add_argument('--gigabytes', type=float, default=1.0, help='of a checkpoint that is verified')
  parser.add_argument('--output', help='a file for the table')
  args = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  lines, good = [], True
  with tempfile.TemporaryDirectory() as folder:
    os.environ['TEXTGEN_JAX_CACHE'] = f'{folder}/cache'
    for line, is_good in report(pathlib.Path(folder), args):
      print(line, flush=True)
      lines.append(line)
      good = good and is_good
  if args.output:
    pathlib.Path(args.output).write_text('\n'.join(lines) + '\n', encoding='utf-8')
  return 0 if good else 1


def report(folder: pathlib.Path, args: argparse.Namespace) -> Iterator[tuple[str, bool]]:
  """The file's lines, as they become known."""
  versions = ', '.join(f'{name} {importlib.metadata.version(name)}' for name in ('jax', 'jaxlib', 'orbax-checkpoint', 'numpy'))
  yield f'# Faults, {datetime.date.today()}\n', True
  yield f'`{" ".join(["python", "benchmarks/faults.py", *sys.argv[1:]])}`\n', True
  yield f'{machine()}; Python {platform.python_version()}, {versions}\n', True
  yield '| what was done | how often | what was seen | as promised |\n|---|---|---|---|', True
  tests: list[Callable[[], Iterator[Row]]] = [
    lambda: kills(folder, args.kills, args.seed),
    lambda: stops(folder, args.signals, args.seed),
    lambda: damages(folder, args.flips, args.seed),
    lambda: verifying(folder, args.gigabytes),
  ]
  for what, times, seen, good in itertools.chain.from_iterable(test() for test in tests):
    yield f'| {what} | {times} | {seen} | {"yes" if good else "NO"} |', good


def machine() -> str:
  cpus = pathlib.Path('/proc/cpuinfo')
  lines = cpus.read_text().splitlines() if cpus.exists() else []
  names = {line.partition(':')[2].strip() for line in lines if line.startswith('model name')}
  return f'{os.cpu_count()} cores, {", ".join(sorted(names)) or platform.machine()}, {platform.system()} {platform.release()}'


def directory(folder: pathlib.Path, name: str) -> pathlib.Path:
  path = folder / name
  path.mkdir()
  return path


def same_end(runs: Any, workdir: pathlib.Path) -> bool:
  try:
    fault_runs.assert_same_end(workdir, runs.whole)
  except AssertionError as error:
    print(f'{workdir}: {error}', file=sys.stderr)
    return False
  return True


def kills(folder: pathlib.Path, count: int, seed: int) -> Iterator[Row]:
  """Half of them a model."""
  for kind in fault_runs.MODELS:
    n = count // 2
    runs = fault_runs.Runs(directory(folder, f'kill {kind}'), kind, fault_runs.STEPS_A_KILL * n)
    rng, moments = random.Random(f'{kind} {seed}'), itertools.cycle(fault_runs.MOMENTS)
    workdir, seen = folder / f'killed {kind}', collections.Counter[str]()
    while seen['SIGKILL'] < n:
      left = fault_runs.killed(runs, workdir, next(moments), rng)
      if left is None:
        break
      seen.update(['SIGKILL'] + ['a temporary folder stood'] * any('tmp' in name for name in left))
      seen.update(['a half-deleted step stood'] * any('.deleted' in name for name in left))
    runs.finish(workdir)
    same = same_end(runs, workdir)
    stood = ', '.join(f'{name}: {times}' for name, times in seen.items() if name != 'SIGKILL')
    ends = 'every bit of the end is that of the undisturbed run' if same else 'another end than the undisturbed run'
    what = f'SIGKILL at random moments, {kind}, then the same command'
    yield what, str(seen['SIGKILL']), f'{ends}; {stood}', same and seen['SIGKILL'] == n


def plain_state(params: Any) -> state.TrainState:
  """Parameters without an optimizer."""
  zero = np.int32(0)
  return state.TrainState(
    step=zero,
    updates=zero,
    data_offset=zero,
    root_key=np.zeros(2, np.uint32),
    health=jax.tree.map(np.asarray, health.fresh()),
    params=params,
    trained=None,
    opt_state={},
    carry=None,
  )


def save_seconds(workdir: pathlib.Path) -> float:
  """Of the run's own state, to the disk and back from `wait`; the longest of five."""
  with tempfile.TemporaryDirectory() as target:
    found = verify_resume.stored(workdir, fault_runs.saved_steps(workdir)[-1])
    leaves = {name.replace('/', '_'): leaf for name, leaf in found.items()}
    kept = checkpoints.Checkpoints(pathlib.Path(target))
    times = []
    for step in range(5):
      began = time.perf_counter()
      kept.save(step, plain_state(leaves), {})
      kept.wait()
      times.append(time.perf_counter() - began)
    kept.close()
  return max(times)


def stops(folder: pathlib.Path, count: int, seed: int) -> Iterator[Row]:
  runs = fault_runs.Runs(directory(folder, 'stop'), 'lstm', fault_runs.STEPS_A_KILL * count)
  rng, workdir, seconds = random.Random(seed), folder / 'stopped', []
  for moment in itertools.islice(itertools.cycle(SIGNAL_MOMENTS), count):
    found = fault_runs.stopped(runs, workdir, moment, signal.SIGTERM, rng, *(fault_runs.SAMPLES if moment == 'sampling' else ()))
    if found:
      seconds.append(found[1])
  runs.finish(workdir)
  same, save = same_end(runs, workdir), save_seconds(runs.whole)
  good = same and len(seconds) == count and max(seconds) <= 2 + save
  took = f'{statistics.median(seconds):.2f} s in the middle, {max(seconds):.2f} s at most; a save takes up to {save:.2f} s'
  lost = 'no step lost, every bit of the end the same' if same else 'ANOTHER END'
  yield 'SIGTERM at random moments, then the same command', str(len(seconds)), f'exit code 143 each time; {took}; {lost}', good


def damages(folder: pathlib.Path, flips: int, seed: int) -> Iterator[Row]:
  """Each through train.py's own main: the damaged step is trained anew, and the end compared."""
  damaged = fault_damage.make(directory(folder, 'damage'))
  rng = random.Random(seed)
  paths = fault_damage.files(damaged.folder())
  for what, harm, chosen in (
    ('a random bit flipped in a random file', fault_damage.flip, [rng.choice(paths) for _ in range(flips)]),
    ('each file cut at a random byte', fault_damage.truncate, paths),
    ('each file deleted', fault_damage.delete, paths),
  ):
    wrong = []
    for path in chosen:
      damaged.reset()
      harm(path, rng)
      wrong += [found for found in (damaged.sampling(path), damaged.evaluating(path), damaged.training(path)) if found]
      if not wrong and not same_end(damaged, damaged.copy):
        wrong.append(f'{path}: another end')
    print(*wrong, sep='\n', file=sys.stderr, end='\n' if wrong else '')
    named = 'named by training, and by sampling and evaluation where they read the file'
    seen = f'{len(chosen)} {named}; the step before used, every bit of the end the same; 0 silent'
    yield f'newest checkpoint: {what}', str(len(chosen)), '; '.join(wrong[:3]) or seen, not wrong


def verifying(folder: pathlib.Path, gigabytes: float) -> Iterator[Row]:
  """Reading and hashing a checkpoint that the system still holds in memory, as right after a save."""
  arrays = [np.random.default_rng(n).standard_normal(8_000_000, np.float32) for n in range(max(1, round(gigabytes * 1e9 / 32e6)))]
  kept = checkpoints.Checkpoints(folder / 'large')
  began = time.perf_counter()
  kept.save(1, plain_state({f'array_{n}': a for n, a in enumerate(arrays)}), {})
  kept.close()
  saving, times = time.perf_counter() - began, []
  step = folder / 'large' / 'checkpoints' / '1'
  size = sum(path.stat().st_size for path in step.rglob('*') if path.is_file()) / 1e9
  for _ in range(5):
    began = time.perf_counter()
    assert integrity.problem(step, checkpoints.TO_TRAIN) is None
    times.append((time.perf_counter() - began) / size)
  seen = f'{statistics.median(times):.2f} s/GB ({min(times):.2f} to {max(times):.2f}); its save took {saving / size:.2f} s/GB'
  yield f'a checkpoint of {size:.2f} GB verified', str(len(times)), seen, statistics.median(times) <= 1


if __name__ == '__main__':
  sys.exit(main())
