"""What safety costs: the guard against steps that aren't finite, and saving, as shares of a training step's time.

  python benchmarks/safety.py [--config=configs/shakespeare_char.py] [--repeats=15] [--steps=40]

Guard: blocks of steps in turns, by the step as it is and by one compiled without it, where every step counts as finite. Saving: blocks of
steps in turns, with a save begun at their start and without; the difference, which holds what the training thread waits for and what the
background takes away from it, is spread over `training.checkpoint_every_steps`. The median of the paired differences is given, with the
interval that holds the median of such pairs with 95% (order statistics).
"""

import argparse
import importlib.metadata
import math
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from textgen_jax import assembly, command_line, compilation, workdir
from textgen_jax.training import checkpoints, step


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default='configs/shakespeare_char.py')
  parser.add_argument('--repeats', type=int, default=15)
  parser.add_argument('--steps', type=int, default=40, help='in a block; a save should end within it')
  args = parser.parse_args()
  versions = ', '.join(f'{name} {importlib.metadata.version(name)}' for name in ('jax', 'jaxlib', 'optax', 'orbax-checkpoint'))
  print(f'{os.cpu_count()} cores; {versions}; {args.config}; {args.repeats} pairs of {args.steps} steps\n')
  with tempfile.TemporaryDirectory() as folder:
    experiment = command_line.load_config(args.config)
    compilation.split_cores(experiment)
    parts = assembly.Parts(experiment, pathlib.Path(folder, 'run'), step.no_hook)
    batches = [parts.batch(i) for i in range(16)]
    guarded = compiled(parts, batches[0])
    with mock.patch.object(step.jnp, 'isfinite', lambda x: jnp.ones_like(x, bool)):
      unguarded = compiled(assembly.Parts(parts.experiment, parts.directory, step.no_hook), batches[0])
    print(f'a step takes {paired(guarded, unguarded, parts, batches, args):.2f} ms')
    saving(guarded, parts, batches, args, pathlib.Path(folder))


def compiled(parts: assembly.Parts, batch: Any) -> Callable[[Any, Any], Any]:
  return parts.step.lower(parts.abstract, batch).compile()


def block(take: Callable[[Any, Any], Any], state: Any, batches: list[Any], steps: int) -> Any:
  for i in range(steps):
    state, _ = take(state, batches[i % len(batches)])
  return jax.block_until_ready(state)


def paired(guarded: Any, unguarded: Any, parts: assembly.Parts, batches: list[Any], args: argparse.Namespace) -> float:
  """Prints the guard's cost; gives the milliseconds of a step."""
  states = {take: block(take, parts.init(), batches, 3) for take in (guarded, unguarded)}
  seconds: dict[Any, list[float]] = {guarded: [], unguarded: []}
  for turn in range(args.repeats):
    for take in (guarded, unguarded) if turn % 2 else (unguarded, guarded):
      began = time.perf_counter()
      states[take] = block(take, states[take], batches, args.steps)
      seconds[take].append(time.perf_counter() - began)
  shares = [with_ / without - 1 for with_, without in zip(seconds[guarded], seconds[unguarded], strict=True)]
  print(f'guard: {told(shares)} of a step')
  return statistics.median(seconds[guarded]) / args.steps * 1e3


def saving(take: Any, parts: assembly.Parts, batches: list[Any], args: argparse.Namespace, folder: pathlib.Path) -> None:
  kept = checkpoints.Checkpoints(folder)
  about = {'tokenizer': workdir.tokenizer_files(parts.tokenizer)}
  state = block(take, parts.init(), batches, 3)
  every = parts.experiment.training.checkpoint_every_steps
  shares, ends_s = [], []
  for turn in range(args.repeats + 1):
    seconds = {}
    for saves in (True, False) if turn % 2 else (False, True):
      began = time.perf_counter()
      if saves:
        kept.save(int(state.step), state, about)
      state = block(take, state, batches, args.steps)
      seconds[saves] = time.perf_counter() - began
      if saves:
        kept.wait()
        ends_s.append(time.perf_counter() - began - seconds[saves])
    if turn:  # the first one warms up
      shares.append((seconds[True] - seconds[False]) / (seconds[False] / args.steps * every))
  kept.close()
  print(f'saving every {every} steps: {told(shares)} of throughput; at the end of a block {max(ends_s):.2f} s of a save were left at most')


def told(shares: list[float]) -> str:
  """The median, and the order statistics that hold it with 95%."""
  ordered, count = sorted(shares), len(shares)
  below, cut = 0.0, 0
  while below + math.comb(count, cut) / 2**count <= 0.025:
    below += math.comb(count, cut) / 2**count
    cut += 1
  low, high = ordered[max(cut - 1, 0)], ordered[count - max(cut, 1)]
  return f'{statistics.median(shares):+.2%} ({low:+.2%} to {high:+.2%})'


if __name__ == '__main__':
  main()
