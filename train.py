"""Trains a language model, going on where the workdir stands.

  python train.py --config=configs/shakespeare_char.py --workdir=runs/shakespeare [--config.training.num_steps=2000 ...]

Any field of the configuration can be set by its path. --help with a --config lists
that configuration's fields and values. Ctrl-C saves and leaves; the same command goes on.

Several machines: start it on each, with the same --workdir, which all see. SLURM, Kubernetes, Open MPI and Cloud TPU
tell it who it is; by hand --coordinator=HOST:PORT --num_processes=N --process_id=I do (docs/scale.md).
"""

import sys
from collections.abc import Sequence

from textgen_jax import allocator, signals

if __name__ == '__main__':
  allocator.keep_memory()  # before any thread, of which a watch is one
  signals.watch()  # before what takes seconds to import

from textgen_jax import command_line


def main(argv: Sequence[str]) -> int:
  code = command_line.run(_main, argv)
  if 'jax' in sys.modules:
    from textgen_jax import launch

    launch.leave(code, f'exit code {code}')  # where there are others
  return code


def _main(argv: Sequence[str]) -> None:
  # What imports JAX, 0.6 s, and what imports the rest is imported where it is used: a mistake in the flags doesn't wait for it.
  if command_line.wants_help(argv):
    print(f'{__doc__}\n{command_line.launch_help()}\n{command_line.experiment_help(argv)}')
    return
  experiment, workdir, given = command_line.parse_training(argv)
  from textgen_jax import experiment as experiment_lib

  experiment_lib.check(experiment)
  from textgen_jax import compilation, launch, launch_flags, trainer

  launched = launch_flags.Launch(**given)
  launched.check()
  compilation.keep_compiled()
  compilation.split_cores(experiment, launched.several)
  signals.before_leaving(launch.announce)
  launch.join(launched)
  trainer.train(experiment, workdir)


if __name__ == '__main__':
  sys.exit(main(sys.argv))
