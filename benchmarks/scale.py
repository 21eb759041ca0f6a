"""How what a device holds and hears grows with devices and length, counted in programs that XLA has compiled for eight CPU devices.

  python benchmarks/scale.py

Each row is `python -m textgen_jax.tools.plan --compile --format=json`, a process of its own. Nothing is run, so that no row depends on how
busy the machine is: bytes of the state are those of its shapes, the peak and the collectives those of the program.
"""

import json
import subprocess
import sys
from typing import Any

MODEL = {'model.dim': 256, 'model.num_layers': 4, 'model.num_heads': 8, 'model.vocab_multiple': 8, 'training.steps_per_dispatch': 1}
KIB = 1024
# Large enough that what is copied to every device, norms and counts, doesn't show.
FSDP = (1, 2, 4, 8)
LENGTHS = (512, 1024, 2048, 4096)
MESHES = ((8, 1, 1), (1, 8, 1), (2, 4, 1), (1, 1, 8), (2, 2, 2))


def main() -> None:
  print('| fsdp | parameters and optimizer, KiB a device | times fsdp 1 | compiled peak, KiB |\n|---|---|---|---|')
  whole = 0
  for fsdp in FSDP:
    told = plan({'sharding.data': 8 // fsdp, 'sharding.fsdp': fsdp, 'training.batch_size': 8, 'training.sequence_length': 64})
    state = told['bytes']['params'] + told['bytes']['optimizer']
    whole = whole or state
    print(f'| {fsdp} | {state // KIB:,} | {state / whole:.4f} | {told["compiled"]["peak_bytes"] // KIB:,} |', flush=True)

  print("\n| length | kernel | compiled peak but for the state, KiB | a token, bytes |\n|---|---|---|---|")
  for kernel in ('blocks', 'plain'):
    for length in LENGTHS:
      fields = {'training.sequence_length': length, 'training.batch_size': 1, 'model.attention_kernel': kernel}
      told = plan({'sharding.data': 1, 'model.remat': 'full', 'model.scan_layers': True, **fields}, 'cpu:1')
      rest = told['compiled']['peak_bytes'] - told['bytes']['params'] - told['bytes']['optimizer']
      print(f'| {length:,} | {kernel} | {rest // KIB:,} | {rest / length:,.0f} |', flush=True)

  head = '| data x fsdp x tensor | received a device and step, by formula, KiB | in the program, KiB | kinds in the program |'
  print(f'\n{head}\n|---|---|---|---|')
  for sizes in MESHES:
    mesh = {f'sharding.{name}': size for name, size in zip(('data', 'fsdp', 'tensor'), sizes, strict=True)}
    told = plan({**mesh, 'training.batch_size': 8, 'training.sequence_length': 64})
    formula = sum(one['bytes'] for one in told['collectives'])
    said = told['compiled']['collectives']
    kinds = ', '.join(f'{kind} {one["times"]}' for kind, one in said.items())
    name, received = ' x '.join(map(str, sizes)), int(sum(one['bytes'] for one in said.values()))
    print(f'| {name} | {formula // KIB:,} | {received // KIB:,} | {kinds} |', flush=True)


def plan(fields: dict[str, Any], topology: str = 'cpu:8') -> dict[str, Any]:
  """What the planner says of the debug configuration with these fields."""
  flags = [f'--config.{name}={value}' for name, value in (MODEL | fields).items()]
  command = [sys.executable, '-m', 'textgen_jax.tools.plan', '--config=configs/debug.py', f'--topology={topology}', '--vocab_size=257']
  done = subprocess.run([*command, '--compile', '--format=json', *flags], capture_output=True, text=True)
  if done.returncode:
    raise SystemExit(done.stderr)
  return json.loads(done.stdout)


if __name__ == '__main__':
  main()
