"""Plans on eight devices of a CPU beside what is there: prints, for each mesh, both counts of the state's bytes, and the plan's own output.

  python on_devices.py
"""

import contextlib
import io
import json
import math
import pathlib
import sys

import jax

from textgen_jax import command_line, program, sharding
from textgen_jax import experiment as experiment_lib
from textgen_jax.planning import ahead, devices, footprint
from textgen_jax.tools import plan

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'
MESHES = {'transformer': {'data': (8, 1, 1), 'fsdp': (1, 8, 1), 'all': (2, 2, 2), 'tensor': (1, 1, 8)}, 'lstm': {'both': (2, 4, 1)}}
SMALL = {'dim': 64, 'num_layers': 1, 'vocab_multiple': 8}


def argv(kind, sizes, *more):
  config = {'transformer': 'debug', 'lstm': 'shakespeare_lstm'}[kind]
  fields = {f'model.{name}': value for name, value in SMALL.items()} | {'training.batch_size': 16, 'training.sequence_length': 32}
  fields |= {f'sharding.{name}': size for name, size in zip(sharding.MESH_AXES, sizes, strict=True)}
  if kind == 'transformer':
    fields['model.num_heads'] = 8
  return ['plan', f'--config={CONFIGS}/{config}.py', *(f'--config.{name}={value}' for name, value in fields.items()), *more]


def held(tree):
  """Bytes on the first device."""
  return sum(
    math.prod(shard.data.shape) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards if shard.device.id == 0
  )  # fmt: skip


def state_bytes(kind, sizes):
  """Of the real state, and as the plan counts them."""
  given = command_line.overrides(argv(kind, sizes))
  experiment = experiment_lib.resolve(command_line.experiment_of(argv(kind, sizes)[1].partition('=')[2], given))
  parts = program.Program(experiment, 257, sharding.make_mesh(experiment.sharding))
  state = parts.init()
  found = footprint.of_step(parts)
  real = {'params': held(state.params), 'optimizer': held(state.opt_state), 'carry': held(state.carry)}
  return real, {name: getattr(found, name) for name in real}


def planned(*arguments):
  told = io.StringIO()
  with contextlib.redirect_stdout(told):
    code = plan.main(arguments)
  return {'code': code, **json.loads(told.getvalue())}


def main():
  ahead.stay_here(devices.parse('cpu:8'))
  jax.config.update('jax_disable_most_optimizations', True)
  found = {}
  for kind, meshes in MESHES.items():
    for name, sizes in meshes.items():
      real, counted = state_bytes(kind, sizes)
      found[f'{kind} {name}'] = {'real': real, 'counted': counted}
  for name in ('fsdp', 'tensor'):
    more = ('--topology=cpu:8', '--compile', '--format=json', '--vocab_size=257')
    found[f'transformer {name}']['plan'] = planned(*argv('transformer', MESHES['transformer'][name], *more))
  print(json.dumps(found))


if __name__ == '__main__':
  sys.exit(main())
