"""Trains a language model, going on where the workdir stands.

  python train.py --config=configs/shakespeare_char.py --workdir=runs/shakespeare [--config.training.num_steps=2000 ...]

Any field of the configuration can be set by its path. --help with a --config lists
that configuration's fields and values. Ctrl-C saves and leaves; the same command goes on.
"""

import sys
from collections.abc import Sequence

from textgen_jax import signals

if __name__ == '__main__':
  signals.watch()  # before what takes seconds to import

from textgen_jax import command_line, compilation
from textgen_jax import experiment as experiment_lib


def main(argv: Sequence[str]) -> int:
  return command_line.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
  if command_line.wants_help(argv):
    path = command_line.named_config(argv)
    config = command_line.load_config(path) if path else experiment_lib.Experiment()
    print(f'{__doc__}\nThe fields{" of " + path if path else ", with their defaults"}:\n{command_line.config_help(config)}')
    return
  experiment, workdir = command_line.parse_experiment(argv)
  experiment_lib.check(experiment)
  compilation.keep_compiled()
  compilation.split_cores(experiment)
  from textgen_jax import trainer  # after the checks: it takes seconds to import

  trainer.train(experiment, workdir)


if __name__ == '__main__':
  sys.exit(main(sys.argv))
