"""Trains one step of a run once more and shows what it saw, as lines of JSON.

  python -m textgen_jax.tools.replay --workdir=runs/shakespeare --step=412

goes from the nearest checkpoint before the step (--config.training.keep_every_steps keeps more of them), or from the
start, to that step with the run's own compiled step. The first line tells its loss (nats a token), gradient norm and
learning rate, and whether they are to the bit what metrics.jsonl has; exit code 1 where they are not. A line for each
row follows: its text, tokens and their losses; then one for each parameter: the norms of its gradient and its own.
Rollbacks are followed as the run made them. Nothing is written to the workdir. From Python,
`replay(workdir, step, hook)` takes the loss hook that the run was trained with.
"""

from textgen_jax import signals

if __name__ == '__main__':
  signals.watch()  # before anything that takes its time to import

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from textgen_jax import assembly, command_line, compilation, errors, rerun, trees, workdir
from textgen_jax import experiment as experiment_lib
from textgen_jax.models import base as models_base
from textgen_jax.text import base
from textgen_jax.tools import report
from textgen_jax.training import checkpoints, diagnose, health, metrics, progress, state, step

COMPARED = ('loss', 'grad_norm', 'learning_rate')


@dataclasses.dataclass(frozen=True)
class Run:
  """What a workdir tells of its run."""

  directory: pathlib.Path
  kept: checkpoints.Checkpoints | None  # None: no save was finished
  steps: list[int]  # kept ones
  log: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Detail:
  """One step in full; arrays are on the host."""

  batch: Any
  nll_BT: np.ndarray
  objective: float  # the loss and the hook's term, nats a token
  grads: Any
  params: Any


def main(argv: Sequence[str]) -> int:
  return command_line.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
  values = flags.FlagValues()
  flags.DEFINE_string('workdir', None, 'where the run was trained', flag_values=values)
  flags.DEFINE_integer('step', None, 'to replay, from 1', flag_values=values)
  flags.DEFINE_integer('rows', 4, 'of the batch to show; 0: all', flag_values=values)
  if not command_line.parsed(values, argv, __doc__):
    return
  command_line.need_workdir(values)
  if values.step is None:
    raise errors.UserError('--step is missing: name the step to replay, from 1')
  if values.rows < 0:
    raise errors.UserError(f'--rows={values.rows} is below 0')
  compilation.keep_compiled()
  lines = replay(values.workdir, values.step, rows=values.rows)
  first = next(lines)
  for line in (first, *lines):
    print(report.printable(json.dumps(line, ensure_ascii=False)))
  if first['differences']:
    name, (logged, now) = next(iter(first['differences'].items()))
    raise errors.RunError(f'step {values.step}: train/{name} was logged as {logged}, and the replay has {now}')


def replay(directory: str | os.PathLike, number: int, hook: step.LossHook = step.no_hook, rows: int = 0) -> Iterator[dict[str, Any]]:
  """The lines that the command prints.

  Args:
    directory: the workdir.
    number: the step, from 1.
    hook: what the run was trained with.
    rows: of the batch to show; 0: all.

  Raises:
    UserError: there is no run, or it has no such step.
  """
  run = open_run(pathlib.Path(directory))
  last = max([*run.steps, *(line['step'] for line in run.log)], default=0)
  if not 1 <= number <= last:
    raise errors.UserError(f'--step={number} is not in [1, {last}], the steps that {directory} has trained')
  experiment = experiment_of(run, number)
  compilation.split_cores(experiment)  # the same devices give the same bits
  parts = assembly.Parts(experiment, run.directory, hook)
  jumps = [jump for jump in jumps_of(run) if jump.step <= number]
  train_state = parts.fresh() if run.kept is None else rerun.nearest(parts, run.kept, number - 1)
  restored = int(train_state.step)
  progress.say(f'going from {f"the checkpoint of step {restored}" if restored else "the start"} to step {number}')
  place = number - 1 + health.data_offset(jumps, number)
  compiled = parts.step.lower(train_state, *parts.inputs([place])).compile()
  train_state = rerun.advance(parts, compiled, train_state, number - 1, jumps)
  detail = look_into(parts, train_state, parts.batch(place))
  key = jax.random.fold_in(train_state.root_key, number - 1)
  updates, spikes = int(train_state.updates), int(train_state.health.spiked_steps)
  train_state, sums = compiled(train_state, *parts.inputs([place]))
  (sums,) = step.each(sums, 1)
  values = {name: metrics.jsonable(value) for name, value in step.means(sums).items() if name not in step.COUNTS}
  told = next((line for line in run.log if line['step'] == number and 'train/loss' in line), None)
  logged = {name: told.get(f'train/{name}') for name in COMPARED} if told else {}
  applied, spike = int(train_state.updates) > updates, int(train_state.health.spiked_steps) > spikes
  weights_BT = detail.batch.weights_BT
  differences = {name: [value, values[name]] for name, value in logged.items() if value != values[name]}
  if differences:
    here = f'{jax.device_count()} devices of kind {jax.devices()[0].device_kind} and products of {parts.product_dtype}'
    progress.say(f'this replay has {here}: other bits may come of a run that had others, or went on with others later')
  yield {
    'step': number,
    'from_step': restored,
    'batch': place,
    'applied': applied,
    'spike': spike,
    **values,
    'objective': metrics.jsonable(detail.objective),
    'mean_of_token_losses': metrics.jsonable(float((detail.nll_BT.astype(np.float64) * weights_BT).sum() / max(weights_BT.sum(), 1e-30))),
    'logged': logged or None,
    'differences': differences,
    # The parameters and the carry are what they were where the step wasn't applied.
    **({} if applied or spike else {'diagnosis': _diagnosis(parts, train_state, place, key)}),
  }
  yield from row_lines(parts.tokenizer, detail, rows)
  yield from parameter_lines(detail)


def open_run(directory: pathlib.Path) -> Run:
  if not (directory / 'config.json').is_file():
    raise errors.UserError(f'workdir={str(directory)!r}: there is no config.json: no run was ever trained there')
  kept = checkpoints.Checkpoints(directory, read_only=True) if checkpoints.listed(directory / 'checkpoints') else None
  return Run(directory, kept, kept.steps() if kept else [], metrics.read(directory / 'metrics.jsonl'))


def experiment_of(run: Run, number: int) -> experiment_lib.Experiment:
  """What the step was trained with: some fields may have changed since, as the next checkpoint after the step knows."""
  later = [one for one in run.steps if one >= number]
  if run.kept and later:
    return workdir.described(run.kept.about(later[0]), f'{run.directory}/checkpoints/{later[0]}')[0]
  path = run.directory / 'config.json'
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise errors.UserError(f'{path} is no JSON: {error}') from error
  return experiment_lib.from_json(content, str(path))


def jumps_of(run: Run) -> list[health.Jump]:
  """The latest checkpoint knows all of the jumps before it, and the log tells of later ones."""
  latest = run.steps[-1] if run.steps else 0
  found = health.jumps_from(run.kept.about(latest).get('data_jumps')) if run.kept and latest else []
  name = 'rollback/data_offset'
  return found + [health.Jump(line['step'], line[name]) for line in run.log if name in line and line['step'] > latest]


def look_into(parts: assembly.Parts, train_state: state.TrainState, batch: Any) -> Detail:
  """Each token's loss and each parameter's gradient, with the dropout of the step."""

  def objective(params: Any, carry: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Any]:
    terms = step.loss_terms(parts.model, parts.hook, params, carry, batch, key)
    return terms.objective, (terms.nll_BT, terms.weight)

  examine = jax.jit(jax.value_and_grad(objective, has_aux=True))
  steps = parts.experiment.training.accumulation_steps
  key = jax.random.fold_in(train_state.root_key, train_state.step)
  nll_BT = np.zeros(batch.targets_BT.shape, np.float32)
  totals: Any = None
  for i, (micro_batch, carry, micro_key) in enumerate(step.each_micro_batch(steps, batch, train_state.carry, key)):
    with models_base.operands(parts.product_dtype):
      (value, (nll_BT[i::steps], weight)), grads = examine(train_state.weights, carry, micro_batch, micro_key)
    found = value, weight, grads
    totals = found if totals is None else jax.tree.map(jnp.add, totals, found)
  value, weight, grads = jax.device_get(totals)
  weight = max(float(weight), 1.0)
  params = jax.device_get(train_state.weights)
  return Detail(jax.device_get(batch), nll_BT, float(value) / weight, jax.tree.map(lambda g: g / weight, grads), params)


def _diagnosis(parts: assembly.Parts, train_state: state.TrainState, place: int, key: jax.Array) -> str:
  find = diagnose.make_diagnose(parts.model, parts.hook, parts.experiment.training.accumulation_steps, parts.product_dtype)
  return find(train_state.weights, train_state.carry, parts.batch(place), key)


def row_lines(tokenizer: base.Tokenizer, detail: Detail, rows: int) -> Iterator[dict[str, Any]]:
  """A line a row: the text, and for each token after the first its loss and how much it counts."""
  batch = detail.batch
  for row in range(min(rows or len(detail.nll_BT), len(detail.nll_BT))):
    ids = [int(batch.tokens_BT[row, 0]), *map(int, batch.targets_BT[row])]
    yield {
      'row': row,
      'text': tokenizer.decode(ids),
      'tokens': ids,
      'pieces': base.token_texts(tokenizer, ids),
      'losses_nats': [metrics.jsonable(float(nll)) for nll in detail.nll_BT[row]],
      'weights': [float(weight) for weight in batch.weights_BT[row]],
      'starts': [] if batch.starts_BT is None else [int(place) for place in np.flatnonzero(batch.starts_BT[row])],
    }


def parameter_lines(detail: Detail) -> Iterator[dict[str, Any]]:
  for (name, grad), (_, param) in zip(trees.named_leaves(detail.grads), trees.named_leaves(detail.params), strict=True):
    norms = (metrics.jsonable(float(np.linalg.norm(np.asarray(x, np.float64)))) for x in (grad, param))
    yield {'parameter': name, **dict(zip(('grad_norm', 'norm'), norms, strict=True))}


if __name__ == '__main__':
  sys.exit(main(sys.argv))
