"""Trains a language model, going on where the workdir stands.

  python train.py --config=configs/shakespeare_char.py --workdir=runs/shakespeare [--config.training.num_steps=2000 ...]

Any field of the configuration can be set by its path. --help with a --config lists
that configuration's fields and values. Ctrl-C saves and leaves; the same command goes on.
"""

import sys
from collections.abc import Sequence

from textgen_jax import allocator, signals

if __name__ == '__main__':
  allocator.keep_memory()  # before any thread, of which a watch is one
  signals.watch()  # before what takes seconds to import

from textgen_jax import command_line


def main(argv: Sequence[str]) -> int:
  return command_line.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
  # What imports JAX, 0.6 s, and what imports the rest is imported where it is used: a mistake in the flags doesn't wait for it.
  if command_line.wants_help(argv):
    print(f'{__doc__}\n{command_line.experiment_help(argv)}')
    return
  experiment, workdir = command_line.parse_experiment(argv)
  from textgen_jax import experiment as experiment_lib

  experiment_lib.check(experiment)
  from textgen_jax import compilation, trainer

  compilation.keep_compiled()
  compilation.split_cores(experiment)
  trainer.train(experiment, workdir)


if __name__ == '__main__':
  sys.exit(main(sys.argv))
