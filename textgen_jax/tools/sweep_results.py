"""What a sweep has found so far: results.jsonl, which outlives a kill, and the table."""

import dataclasses
import json
import math
import os
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from textgen_jax import errors
from textgen_jax import experiment as experiment_lib
from textgen_jax.sampling import journal, manifest

HEADINGS = ('seeds', 'val loss (nats)', 'standard error', 'bits per byte', 'best step', 'seconds', 'tokens/s')


class Combination(NamedTuple):
  """A place in the grid."""

  settings: dict[str, Any]  # by field
  experiment: experiment_lib.Experiment


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What became of one seed."""

  seed: int
  loss_nats: float  # on the whole val split, after the last step; infinite where training diverged
  bits_per_byte: float | None  # None: diverged, or the tokenizer changes the text
  curve: list[tuple[int, float]]  # steps, the last one too, and their losses on what training evaluates by
  diverged_at_step: int | None


@dataclasses.dataclass(frozen=True)
class Record:
  """A combination and its seeds: a line of results.jsonl."""

  settings: dict[str, Any]
  experiment: experiment_lib.Experiment  # whose seed says nothing
  fingerprint: str  # of the text, tokenized
  runs: list[Outcome]
  seconds: float
  trained_tokens: int
  versions: dict[str, str]  # of what trained it last
  device: dict[str, Any]

  @property
  def sound(self) -> list[Outcome]:
    return [run for run in self.runs if math.isfinite(run.loss_nats)]

  @property
  def loss_nats(self) -> float:
    return statistics.fmean(run.loss_nats for run in self.runs)

  @property
  def stderr(self) -> float | None:
    """Of the mean loss over seeds; None for one seed, and where one diverged."""
    if len(self.runs) < 2 or len(self.sound) < len(self.runs):
      return None
    return statistics.stdev(run.loss_nats for run in self.runs) / math.sqrt(len(self.runs))

  @property
  def bits_per_byte(self) -> float | None:
    bits = [run.bits_per_byte for run in self.runs]
    return None if None in bits else statistics.fmean(one for one in bits if one is not None)

  @property
  def best_step(self) -> int | None:
    """Where the mean loss over the seeds that didn't diverge was lowest; None where nothing was evaluated on the way."""
    points: dict[int, list[float]] = {}
    for run in self.sound:
      for step, loss in run.curve:
        points.setdefault(step, []).append(loss)
    return min(points, key=lambda step: statistics.fmean(points[step]), default=None)

  def line(self) -> str:
    """Strict JSON: what is infinite becomes null."""
    summary = {
      'settings': self.settings,
      'val_loss_nats': self.loss_nats,
      'val_loss_nats_stderr': self.stderr,
      'val_bits_per_byte': self.bits_per_byte,
      'best_step': self.best_step,
      'tokens_per_s': self.trained_tokens / max(self.seconds, 1e-9),
    }
    own = vars(self) | {'runs': [vars(run) for run in self.runs], 'experiment': experiment_lib.to_json(self.experiment)}
    return journal.line(summary | own)


def record_from(text: str, where: str) -> Record:
  """The reverse of `Record.line`; UserError begins with `where`."""

  def loss(value: float | None) -> float:
    return math.inf if value is None else float(value)

  try:
    content = json.loads(text)
    runs = [
      Outcome(
        run['seed'], loss(run['loss_nats']), run['bits_per_byte'], [(step, loss(at)) for step, at in run['curve']], run['diverged_at_step']
      )
      for run in content['runs']
    ]
    kept = {name: content[name] for name in ('settings', 'fingerprint', 'seconds', 'trained_tokens', 'versions', 'device')}
    return Record(runs=runs, experiment=experiment_lib.from_json(content['experiment'], where), **kept)
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise errors.UserError(f'{where} is no record of a sweep: {type(error).__name__} {error}') from error


class Results:
  """The records of a directory. Every change replaces a whole file: a kill leaves the old one or the new one.

  Args:
    directory: which exists.
    command: what the table is told to come from.

  Raises:
    UserError: results.jsonl holds something else.
  """

  def __init__(self, directory: pathlib.Path, command: str):
    self.path, self._command = directory / 'results.jsonl', command
    try:
      lines = self.path.read_text(encoding='utf-8').splitlines() if self.path.exists() else []
    except ValueError as error:
      raise errors.UserError(f'{self.path} is no text in UTF-8, and no results of a sweep: {error}') from error
    self.records = [record_from(line, f'{self.path}, line {number}') for number, line in enumerate(lines, start=1)]

  def missing(self, experiment: experiment_lib.Experiment, fingerprint: str, num_seeds: int) -> list[int]:
    """Which of the seeds, from the experiment's own on, haven't been trained.

    Raises:
      UserError: they were trained on other text.
    """
    found = self._find(experiment)
    if found and found.fingerprint != fingerprint:
      change = f'fingerprint {found.fingerprint[:12]} -> {fingerprint[:12]}'
      raise errors.UserError(f'{self.path} has results of these settings on other text ({change}): name another --output')
    trained = {run.seed for run in found.runs} if found else set()
    return [seed for seed in range(experiment.seed, experiment.seed + num_seeds) if seed not in trained]

  def add(self, combination: Combination, fingerprint: str, outcomes: Sequence[Outcome], seconds: float, trained_tokens: int) -> Record:
    """Takes what became of some seeds into the combination's record, which it gives."""
    found = self._find(combination.experiment)
    runs = [*(found.runs if found else ()), *outcomes]
    record = Record(
      settings=combination.settings,
      experiment=_without_seed(combination.experiment),
      fingerprint=fingerprint,
      runs=sorted(runs, key=lambda run: run.seed),
      seconds=seconds + (found.seconds if found else 0.0),
      trained_tokens=trained_tokens + (found.trained_tokens if found else 0),
      versions=manifest.versions(),
      device=manifest.device(),
    )
    self.records = [one for one in self.records if one is not found] + [record]
    _replace(self.path, ''.join(one.line() for one in self.records))
    _replace(self.path.with_suffix('.md'), '\n'.join(markdown(self.records, self._command)) + '\n')
    return record

  def _find(self, experiment: experiment_lib.Experiment) -> Record | None:
    same = _without_seed(experiment)
    return next((record for record in self.records if not experiment_lib.differences(record.experiment, same)), None)


def _without_seed(experiment: experiment_lib.Experiment) -> experiment_lib.Experiment:
  return dataclasses.replace(experiment, seed=0)


def _replace(path: pathlib.Path, text: str) -> None:
  temporary = path.with_suffix('.tmp')
  temporary.write_text(text, encoding='utf-8')
  os.replace(temporary, path)


def ranked(records: Sequence[Record]) -> list[Record]:
  """The best first; those with a seed that diverged last.

  By bits per byte, which compare tokenizers too; by loss where a tokenizer changes the text, so that there are none.
  """
  by_bits = all(run.bits_per_byte is not None for record in records for run in record.sound)

  def rank(record: Record) -> tuple[int, float]:
    values = [(run.bits_per_byte or 0.0) if by_bits else run.loss_nats for run in record.sound]
    return len(record.runs) - len(record.sound), statistics.fmean(values) if values else math.inf

  return sorted(records, key=rank)


def table(records: Sequence[Record]) -> list[list[str]]:
  """Cells: a row each, under a heading for each field that differs and `HEADINGS`."""
  records = ranked(records)
  flat = [experiment_lib.flatten(record.experiment) for record in records]
  names = dict.fromkeys(name for one in flat for name in one)
  fields = [name for name in names if any(one.get(name) != flat[0].get(name) for one in flat)]
  rows = [[*(str(one.get(field, '-')) for field in fields), *_cells(record)] for one, record in zip(flat, records, strict=True)]
  return [[*fields, *HEADINGS], *rows]


def _cells(record: Record) -> list[str]:
  def cell(value: float | None) -> str:
    return '-' if value is None else f'{value:.4f}'

  diverged = len(record.runs) - len(record.sound)
  return [
    str(len(record.runs)),
    f'inf ({diverged} diverged)' if diverged else cell(record.loss_nats),
    cell(record.stderr),
    cell(record.bits_per_byte),
    str(record.best_step or '-'),
    f'{record.seconds:,.0f}',
    f'{record.trained_tokens / max(record.seconds, 1e-9):,.0f}',
  ]


def markdown(records: Sequence[Record], command: str) -> list[str]:
  head, *rows = table(records)
  how = 'Means over seeds; losses are of the whole val split after the last step. Seconds and tokens/s take compiling and scoring in.'
  return [f'`{command}`', '', how, '', *('| ' + ' | '.join(cells) + ' |' for cells in (head, ['---'] * len(head), *rows))]
