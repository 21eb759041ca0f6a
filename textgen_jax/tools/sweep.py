"""Trains every combination of a grid of settings with several seeds, and sets their losses on val side by side.

  python -m textgen_jax.tools.sweep --config=configs/shakespeare_char.py --output=runs/sweep --seeds=3
      --grid=optimizer.peak_lr=1e-3,3e-3,6e-3 --grid=model.dropout=0.0,0.1 [--config.training.num_steps=300 ...]

Seed s trains as `train.py --config.seed=s` does, up to rounding, and is scored by its last step's parameters on the whole val split;
never on test.
Seeds count from the configuration's own. With training.eval_every_steps there is a curve too, on the beginning of val where
training.eval_max_tokens says so. Seeds train side by side: as one program where the model is tiny, else a thread a CPU core. No
checkpoints and no samples are written.

--output gets results.jsonl, a line a combination, and results.md, the table that goes to stdout: by mean loss over seeds (by bits per
byte, which is the same order within one text and tokenizer), with the standard error of that mean and the step of the lowest mean loss
on the way. Seconds and tokens/s take compiling and scoring in. A seed that diverged has an infinite loss (null in results.jsonl) and
stands last. What is in results.jsonl isn't trained again: a sweep that was killed goes on with the same command, more --seeds train
those that are missing, and another grid or configuration adds its lines; the table is of all, with a column for each field that differs.
"""

from textgen_jax import signals

if __name__ == '__main__':
  signals.watch()  # before anything that takes its time to import

import contextlib
import dataclasses
import itertools
import math
import pathlib
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from textgen_jax import command_line, errors
from textgen_jax.tools import report

if TYPE_CHECKING:  # what imports JAX is imported where it is used, after the flags are checked
  from textgen_jax.tools import sweep_results

MOST_COMBINATIONS = 1000  # each is built before the first trains
MOST_SEEDS = 1000


def main(argv: Sequence[str]) -> int:
  return command_line.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
  overrides = [arg for arg in argv[1:] if arg.lstrip('-').startswith('config.')]
  values = flags.FlagValues()
  flags.DEFINE_string('config', None, 'a file of configs/; --config.field=value changes one of its fields', flag_values=values)
  flags.DEFINE_multi_string('grid', [], 'FIELD=VALUE,VALUE,...; repeated, all combinations are trained', flag_values=values)
  flags.DEFINE_integer('seeds', 3, 'of each combination', flag_values=values)
  flags.DEFINE_string('output', None, 'a directory for what is written; made where there is none', flag_values=values)
  if not command_line.parsed(values, [arg for arg in argv if arg not in overrides], __doc__):
    return
  if not values.output:
    raise errors.UserError('--output is missing: name a directory for the results, such as --output=runs/sweep')
  if not 1 <= values.seeds <= MOST_SEEDS:
    raise errors.UserError(f'--seeds={values.seeds} is not in [1, {MOST_SEEDS}]')
  from textgen_jax import compilation
  from textgen_jax.tools import sweep_results

  given = [f'--config={values.config}'] if values.config else []
  found = combinations([*given, *overrides], values.grid)
  report.check_directory(values.output)
  compilation.keep_compiled()
  records = sweep(found, values.seeds, pathlib.Path(values.output), f'python -m textgen_jax.tools.sweep {shlex.join(argv[1:])}')
  print('\n'.join(report.aligned(sweep_results.table(records))))


def combinations(configuration: Sequence[str], grid: Sequence[str]) -> 'list[sweep_results.Combination]':
  """Every combination of the grid's values, those of the last field next to each other; equal ones once.

  Args:
    configuration: flags, `--config` and `--config.field`.
    grid: `FIELD=VALUE,VALUE,...`.

  Raises:
    UserError: names the flag, field or value.
  """
  from textgen_jax import experiment as experiment_lib
  from textgen_jax.tools import sweep_results

  axes: dict[str, list[str]] = {}
  for text in grid:
    field, equals, listed = text.partition('=')
    field = field.strip()
    if not (field and equals):
      raise errors.UserError(f'--grid={text!r} is not FIELD=VALUE,VALUE,..., such as optimizer.peak_lr=1e-3,3e-3')
    if field == 'seed':
      raise errors.UserError(f'--grid={text!r}: how many seeds each combination has is told by --seeds; they count from --config.seed')
    if field == 'sharding.cpu_devices':
      raise errors.UserError(f'--grid={text!r} would change nothing: a sweep makes one device of a CPU, and trains seeds side by side')
    if field in axes or any(flag.lstrip('-').startswith(f'config.{field}=') for flag in configuration):
      raise errors.UserError(f'--grid={text!r}: {field} is set twice')
    axes[field] = listed.split(',')
  if (count := math.prod(map(len, axes.values()))) > MOST_COMBINATIONS:
    raise errors.UserError(f'--grid has {count} combinations, above {MOST_COMBINATIONS}')
  found: list[sweep_results.Combination] = []
  for values in itertools.product(*axes.values()):
    own = [f'--config.{field}={value}' for field, value in zip(axes, values, strict=True)]
    experiment, _ = command_line.parse_experiment(['sweep', '--workdir=-', *configuration, *own])
    flat = experiment_lib.flatten(experiment)
    one = sweep_results.Combination({field: flat[field] for field in axes}, experiment)
    if one not in found:
      found.append(one)
  return found


def check(combination: 'sweep_results.Combination', num_seeds: int) -> None:
  """Raises UserError for what can't be trained, or not without a workdir."""
  from textgen_jax import experiment as experiment_lib

  experiment = combination.experiment
  for seed in (experiment.seed, experiment.seed + num_seeds - 1):
    experiment_lib.check(dataclasses.replace(experiment, seed=seed))
  if experiment.training.spike_policy == 'rollback':
    raise errors.UserError("training.spike_policy='rollback' goes back to checkpoints, which a sweep doesn't write: none or skip")
  if experiment.time_limit_minutes:
    raise errors.UserError(f'time_limit_minutes={experiment.time_limit_minutes}: a sweep takes its time, and goes on where it was killed')


def sweep(
  combinations: 'Sequence[sweep_results.Combination]', num_seeds: int, directory: pathlib.Path, command: str = ''
) -> 'list[sweep_results.Record]':
  """Trains what `directory` hasn't got yet, each combination with its own seed and those after it.

  Returns:
    All records of the directory.

  Raises:
    UserError: something doesn't fit, or the directory's results are of other text; nothing was trained.
    Stopped: SIGINT came; what was finished stands in the directory.
  """
  from textgen_jax import assembly, workdir  # after the checks of flags: they take seconds to import
  from textgen_jax.tools import sweep_results
  from textgen_jax.training import step

  for one in combinations:
    check(one, num_seeds)
  # Built once before anything trains: they tell what doesn't fit the text or the devices.
  fingerprints = [assembly.Parts(one.experiment, None, step.no_hook).fingerprint for one in combinations]
  saved = f'what is finished stands in {directory}; the same command goes on from there'
  with signals.caught() as stop, workdir.locked(directory):
    stop.release(saved)
    try:
      results = sweep_results.Results(directory, command)
      _train(list(zip(combinations, fingerprints, strict=True)), num_seeds, results)
    except KeyboardInterrupt as error:
      raise errors.Stopped(f'SIGINT: {saved}', signal.SIGINT) from error
  return results.records


def _train(todo: 'Sequence[tuple[sweep_results.Combination, str]]', num_seeds: int, results: 'sweep_results.Results') -> None:
  from textgen_jax import assembly
  from textgen_jax.tools import sweep_seeds
  from textgen_jax.training import progress, step

  missing = [results.missing(one.experiment, fingerprint, num_seeds) for one, fingerprint in todo]
  due = [(*one, seeds) for one, seeds in zip(todo, missing, strict=True) if seeds]
  if len(due) < len(todo):
    progress.say(f'{len(todo) - len(due)} of {len(todo)} combinations stand in {results.path} already')
  with contextlib.closing(sweep_seeds.Told(sum(len(seeds) * one.experiment.training.num_steps for one, _, seeds in due))) as told:
    for number, (one, fingerprint, seeds) in enumerate(due, start=1):
      named = ''.join(f'{field}={value} ' for field, value in one.settings.items())
      progress.say(f'{number} of {len(due)}: {named}seeds {", ".join(map(str, seeds))}')
      parts = [assembly.Parts(dataclasses.replace(one.experiment, seed=seed), None, step.no_hook) for seed in seeds]
      began, tokens = time.monotonic(), told.tokens
      with contextlib.closing(sweep_seeds.train(parts, told)) as ended:
        for outcomes in ended:
          now, trained = time.monotonic(), told.tokens
          record = results.add(one, fingerprint, outcomes, now - began, trained - tokens)
          began, tokens = now, trained
      error = '' if record.stderr is None else f' ± {record.stderr:.4f}'
      progress.say(f'val loss {record.loss_nats:.4f}{error} nats')


if __name__ == '__main__':
  sys.exit(main(sys.argv))
