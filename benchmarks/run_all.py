"""Runs every benchmark that a CPU can, one after another, and writes a dated table of what they print.

  pip install -e '.[bench]'
  python benchmarks/run_all.py [--text=tinyshakespeare.txt] [--quick] [--only training_speed ...]

Fifty minutes on two cores. `--text`, tiny Shakespeare, is what `time_to_quality` needs. `--quick` has each repeat as little as
it can, to see that all run. The table is `benchmarks/results/DATE-cpu-all.md`, or `--output`.
"""

import argparse
import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'torch', 'transformers')
# Script, its arguments, and those that --quick adds.
BENCHMARKS = (
  ('training_speed', [], ['--repeats=1']),
  *(('breakdown', [f'--setting={setting}'], ['--steps=2']) for setting in ('nanogpt_cpu', 'nanogpt_10m', 'lstm')),
  ('generate', [], ['--repeats=1']),
  ('generate', ['--large'], ['--repeats=1']),
  ('first_step', [], ['--repeats=1']),
  ('time_to_quality', ['--text={text}'], ['--repeats=1']),
  ('lstm_quality', [], ['--minutes=0.5']),
  ('prepare', [], ['--size_mb=20', '--peer_mb=4']),
  ('safety', [], ['--repeats=3']),
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--text')
  parser.add_argument('--quick', action='store_true')
  names = list(dict.fromkeys(name for name, *_ in BENCHMARKS))
  parser.add_argument('--only', nargs='+', default=names, choices=names)
  parser.add_argument('--output', default=f'benchmarks/results/{datetime.date.today()}-cpu-all.md')
  args = parser.parse_args()
  versions = ', '.join(f'{name} {version(name)}' for name in PACKAGES)
  parts = [f'# {datetime.date.today()}, {os.cpu_count()} CPU cores ({processor()}), Python {platform.python_version()}\n\n{versions}\n']
  failed = False
  for name, how, quicker in BENCHMARKS:
    if name not in args.only:
      continue
    if '--text={text}' in how and not args.text:
      print(f'{name}: skipped, it needs --text', file=sys.stderr)
      continue
    argv = [f'benchmarks/{name}.py', *how, *(quicker if args.quick else [])]
    shown = f'python {" ".join(argv)}'.format(text='tinyshakespeare.txt')
    print(f'{shown} ...', file=sys.stderr)
    began = time.perf_counter()
    command = [sys.executable, *(part.format(text=os.path.abspath(args.text or '')) for part in argv)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    failed |= done.returncode != 0
    status = '' if done.returncode == 0 else f', which ended with {done.returncode}'
    parts.append(f'## `{shown}`{status} ({time.perf_counter() - began:.0f} s)\n\n{done.stdout.strip()}\n')
    pathlib.Path(ROOT, args.output).write_text('\n'.join(parts))
  if failed:
    raise SystemExit('some failed')


def version(name: str) -> str:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return '(not installed)'


def processor() -> str:
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.exists() else []
  found = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
  return found[0] if found else platform.processor() or platform.machine()


if __name__ == '__main__':
  main()
