"""Restores a run's newest checkpoint on the processes and devices that there are, and hashes each leaf and some batches.

  python tests/read_on_processes.py CONFIG WORKDIR PORT COUNT INDEX FSDP
"""

import hashlib
import json
import pathlib
import sys

import numpy as np

from textgen_jax import assembly, command_line, launch, launch_flags, processes, sharding, trees
from textgen_jax.training import checkpoints, step


def main(config, workdir, port, count, index, fsdp):
  flags = [f'--config={config}', f'--workdir={workdir}', f'--config.sharding.fsdp={fsdp}']
  experiment, _ = command_line.parse_experiment(['train.py', *flags])
  launch.join(launch_flags.Launch(f'127.0.0.1:{port}', int(count), int(index)))
  parts = assembly.Parts(experiment, pathlib.Path(workdir), step.no_hook)
  kept = checkpoints.Checkpoints(pathlib.Path(workdir), read_only=True)
  found = kept.restore(parts.stored_step, checkpoints.with_shardings(parts.abstract, parts.shardings))
  batches = [parts.batch(i) for i in range(3)]
  own = parts.rows.stop - parts.rows.start
  hashed = {name: digest(leaf) for name, leaf in trees.named_leaves({'state': found, 'batches': batches})}
  print(json.dumps({'hashes': hashed, 'rows': own, 'processes': processes.count()}))
  kept.close()
  launch.leave(0, '')


def digest(leaf):
  return hashlib.sha256(np.ascontiguousarray(sharding.to_host(leaf)).tobytes()).hexdigest()


if __name__ == '__main__':
  main(*sys.argv[1:])
