"""Seconds from the start of the process to nanoGPT's CPU figure, 1.88 nats on the whole val split of tiny Shakespeare, beside PyTorch.

  pip install -e '.[bench]'
  python benchmarks/time_to_quality.py --text=tinyshakespeare.txt [--repeats=3] [--config=configs/tiny_shakespeare_fast.py]

PyTorch trains nanoGPT's published CPU setting (4 layers, 128 wide, 64 long, batch 12, 2,000 steps, AdamW) and scores the whole split once,
at the end. Ours is `python train.py` with that configuration, whose compilation cache is warm from a run before, up to the line that shows
the whole split's loss. Both are processes of their own, in turns; imports, reading the text and scoring count for both.
"""

import argparse
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import training_speed

ROOT = pathlib.Path(__file__).resolve().parent.parent
SETTING, STEPS, TRAIN_FRACTION = 'nanogpt_cpu', 2000, 0.9


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--text', required=True)
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--config', default='configs/tiny_shakespeare_fast.py')
  parser.add_argument('--theirs', action='store_true', help='for the script itself: train in PyTorch')
  args = parser.parse_args()
  if args.theirs:
    print(f'val loss {train_theirs(pathlib.Path(args.text).read_text()):.4f} nats')
    return
  with tempfile.TemporaryDirectory() as compiled:
    contenders = {'PyTorch, nanoGPT': lambda: theirs(args.text), f'textgen_jax, {args.config}': lambda: ours(args, compiled)}
    ours(args, compiled)  # fills the cache
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(args.repeats):
      for name, work in contenders.items():
        found[name].append(work())
  report(found)


def report(found: dict[str, list[tuple[float, float]]]) -> None:
  theirs = [seconds for seconds, _ in next(iter(found.values()))]
  print(f'| | seconds, median of {len(theirs)} | least to most | share of PyTorch, by turn | val loss (nats) |\n|---|---|---|---|---|')
  for name, runs in found.items():
    seconds = [s for s, _ in runs]
    shares = [s / t for s, t in zip(seconds, theirs, strict=True)]
    losses = ', '.join(sorted({f'{loss:.4f}' for _, loss in runs}))
    share = f'{statistics.median(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})'
    print(f'| {name} | {statistics.median(seconds):.1f} | {min(seconds):.1f} to {max(seconds):.1f} | {share} | {losses} |')


def run(command: list[str], **more: str) -> tuple[float, float]:
  """Seconds, and the last loss that it tells of the whole split."""
  began = time.perf_counter()
  done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **more})
  seconds = time.perf_counter() - began
  losses = re.findall(r'val loss ([\d.]+) nats', done.stdout + done.stderr)
  if done.returncode or not losses:
    raise SystemExit(f'{" ".join(command)} ended with {done.returncode}: {done.stderr[-500:]}')
  return seconds, float(losses[-1])


def theirs(text: str) -> tuple[float, float]:
  return run(['benchmarks/time_to_quality.py', f'--text={os.path.abspath(text)}', '--theirs'])


def ours(args: argparse.Namespace, compiled: str) -> tuple[float, float]:
  with tempfile.TemporaryDirectory() as workdir:
    command = ['train.py', f'--config={args.config}', f'--workdir={workdir}/run', f'--config.data.path={os.path.abspath(args.text)}']
    return run(command, JAX_COMPILATION_CACHE_DIR=compiled)


def train_theirs(text: str) -> float:
  import torch

  symbols = {c: i for i, c in enumerate(sorted(set(text)))}
  ids = np.array([symbols[c] for c in text])
  cut = int(TRAIN_FRACTION * len(ids))
  s = training_speed.SETTINGS[SETTING]
  rng = np.random.default_rng(0)

  def batch() -> np.ndarray:
    starts = rng.integers(0, cut - s.sequence_length - 1, s.batch_size)
    return ids[starts[:, None] + np.arange(s.sequence_length + 1)]

  model, take = training_speed.their_training(SETTING)
  for _ in range(STEPS):
    take(torch.from_numpy(batch()))
  rows = ids[cut:]
  rows = rows[: (len(rows) - 1) // s.sequence_length * s.sequence_length + 1]
  x, y = (torch.from_numpy(part.reshape(-1, s.sequence_length)) for part in (rows[:-1], rows[1:]))
  with torch.no_grad():
    loss_sum = sum(
      float(torch.nn.functional.cross_entropy(model(a).flatten(0, 1), b.flatten(), reduction='sum'))
      for a, b in zip(x.split(64), y.split(64), strict=True)
    )
  return loss_sum / y.numel()


if __name__ == '__main__':
  main()
