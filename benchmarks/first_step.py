"""Seconds from `python train.py` to the first finished step, with an empty and with a filled compilation cache, and to the end of --help.

  python benchmarks/first_step.py [--config=configs/shakespeare_char.py] [--repeats=5]

The data are prepared before the clock starts. The step counts as finished when its
line stands in metrics.jsonl, which is after the next step was dispatched.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def first_step_s(config: str, compiled: str) -> float:
  """One run, killed after its first step."""
  with tempfile.TemporaryDirectory() as workdir:
    command = [sys.executable, 'train.py', f'--config={config}', f'--workdir={workdir}/run', '--config.training.log_every_steps=1']
    began = time.perf_counter()
    process = subprocess.Popen(
      command, cwd=ROOT, env={**os.environ, 'JAX_COMPILATION_CACHE_DIR': compiled}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    metrics = pathlib.Path(workdir, 'run', 'metrics.jsonl')
    while not (metrics.exists() and metrics.stat().st_size):
      if process.poll() is not None:
        raise SystemExit(f'{" ".join(command)} ended with {process.returncode} before its first step')
      time.sleep(0.02)
    seconds = time.perf_counter() - began
    process.kill()
    process.wait()
    return seconds


def help_s(script: str) -> float:
  began = time.perf_counter()
  subprocess.run([sys.executable, script, '--help'], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
  return time.perf_counter() - began


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default='configs/shakespeare_char.py')
  parser.add_argument('--repeats', type=int, default=5)
  args = parser.parse_args()
  first_step_s(args.config, tempfile.mkdtemp())  # prepares the data and fills the file cache
  caches, commands = ('empty cache', 'filled cache'), ('train.py', 'sample.py')
  times: dict[str, list[float]] = {name: [] for name in (*caches, *(f'{command} --help' for command in commands))}
  for _ in range(args.repeats):
    with tempfile.TemporaryDirectory() as compiled:
      for name in caches:
        times[name].append(first_step_s(args.config, compiled))
    for command in commands:
      times[f'{command} --help'].append(help_s(command))
  for name, seconds in times.items():
    print(f'{name}: median {statistics.median(seconds):.2f} s of {args.repeats} ({min(seconds):.2f} to {max(seconds):.2f})')


if __name__ == '__main__':
  main()
