"""Draws at every temperature, and at every top-p beside it, and sets the texts beside what people wrote.

  python -m textgen_jax.tools.sweep_sampling --workdir=runs/shakespeare

Greedy text loops, text at temperature 1 is as probable as what people wrote, and hot text falls apart. A table goes
to stdout; sweep.json, sweep.md with an example of each setting and, with matplotlib, sweep.png to --output, which is WORKDIR/sampling
unless it is given. All rows are drawn in one batch, up to 1,024: settings are traced, so another value compiles nothing. train and val
are excerpts of as many tokens as the samples have; the model is told their true text token by token, and a context's length before them.

model entropy: of the model's own distribution, whatever is drawn from it. drawn entropy: of the distribution after temperature and
top-p, estimated as minus the log-probability of what was drawn. log-prob: of what was drawn, under the model's own distribution. new words:
those that the training text lacks. distinct-n: within a sample, over equally many words. loops: samples that end in 3 or more rounds of one
phrase (textgen_jax/statistics/loops.py). Samples of one number and prompt share their random numbers over all settings.
"""

from textgen_jax import signals

if __name__ == '__main__':
  signals.watch()  # before anything that takes its time to import

import dataclasses
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from textgen_jax import command_line, errors
from textgen_jax.data import tokens
from textgen_jax.sampling import params
from textgen_jax.statistics import loops, words
from textgen_jax.statistics import samples as samples_lib
from textgen_jax.text import base
from textgen_jax.tools import report, sweep_picture

BATCH_SIZE = 1024  # rows: a grid is drawn in one batch, but for a large one
EXCERPTS = 64  # of a text that people wrote, where it's long enough
SHOWN_CHARACTERS = 400
# The flags that make rows, each with its name in tables and what it means.
KNOBS = {
  'temperature': ('T', 'a row each; 0: the likeliest token always, drawn once a prompt; may be repeated'),
  'top_p': ('top-p', 'a row each, at temperature 1; may be repeated'),
  'top_k': ('top-k', 'a row each, at temperature 1; may be repeated'),
  'min_p': ('min-p', 'a row each, at temperature 1; may be repeated'),
}
TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
TOP_PS = (0.5, 0.7, 0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class Setting:
  name: str
  knob: str
  value: float
  params: params.SamplingParams


def main(argv: Sequence[str]) -> int:
  return command_line.run(_main, argv)


def _define_flags() -> flags.FlagValues:
  values = flags.FlagValues()
  command_line.define_model_flags(values)
  defaults: dict[str, Sequence[float]] = {'temperature': TEMPERATURES, 'top_p': TOP_PS, 'top_k': (), 'min_p': ()}
  for knob, (_, help_text) in KNOBS.items():
    define: Any = flags.DEFINE_multi_integer if knob == 'top_k' else flags.DEFINE_multi_float
    define(knob, list(defaults[knob]), help_text, flag_values=values)
  integers = {
    'num_samples': (16, 'of each setting and prompt'),
    # The loops of two models of configs/shakespeare_char.py took 49 to 316 characters, and set in after up to 500.
    'max_new_tokens': (1500, "each sample's length: a loop shows after three rounds"),
    'seed': (0, 'another seed, another text'),
  }
  for name, (number, help_text) in integers.items():
    flags.DEFINE_integer(name, number, help_text, flag_values=values)
  help_text = 'what samples begin with, and which is not counted; empty: a document start; may be repeated'
  flags.DEFINE_multi_string('prompt', [''], help_text, flag_values=values)
  flags.DEFINE_string('output', None, 'a directory for what is written; made where there is none', flag_values=values)
  return values


def _main(argv: Sequence[str]) -> None:
  values = _define_flags()
  if not command_line.parsed(values, argv, __doc__):
    return
  command_line.need_workdir(values)
  if values.max_new_tokens < 1:
    raise errors.UserError(f'max_new_tokens={values.max_new_tokens} is not at least 1')
  settings = grid(values)
  output = values.output or os.path.join(values.workdir, 'sampling')
  report.check_directory(output)
  from textgen_jax import compilation, workdir  # after the checks: it takes seconds to import
  from textgen_jax.tools import evaluate

  compilation.keep_compiled()
  trained = workdir.load(values.workdir, values.checkpoint)
  splits = evaluate.own_text(trained).splits
  references = read_references(trained, splits, values.max_new_tokens)
  prompts = list(dict.fromkeys(values.prompt))
  drawn = draw(trained, prompts, settings)
  compared = samples_lib.words_to_compare([sample.text for sample in references['train']])
  yardstick = samples_lib.Yardstick(compared, read_words(trained.tokenizer, splits['train']))
  rows = [samples_lib.row(one.name, one.knob, one.value, texts, yardstick) for one, texts in zip(settings, drawn, strict=True)]
  rows += [samples_lib.row(name, None, None, texts, yardstick) for name, texts in references.items()]
  about = {
    'command': f'python -m textgen_jax.tools.sweep_sampling {shlex.join(argv[1:])}',
    'step': trained.step,
    **{name: getattr(values, name) for name in ('seed', 'num_samples', 'max_new_tokens')},
    'prompts': prompts,
    'compared_words': compared,
  }
  write(pathlib.Path(output), rows, settings, about)
  print('\n'.join(report.aligned(table(rows))))


def grid(values: flags.FlagValues) -> list[Setting]:
  """A setting for each value of each knob; what is the same as an earlier one is left out."""
  base = params.SamplingParams(
    num_samples=values.num_samples, max_new_tokens=values.max_new_tokens, seed=values.seed, log_probs=True, stop_at_end=False
  )
  found: dict[params.SamplingParams, Setting] = {}
  for knob, (short, _) in KNOBS.items():
    for value in getattr(values, knob):
      one = dataclasses.replace(base, **{knob: value})
      if not one.temperature:  # all samples would be the same
        one = dataclasses.replace(one, num_samples=1)
      found.setdefault(one, Setting(f'{short}={value:g}', knob, value, one))
  return list(found.values())


def draw(trained: Any, prompts: Sequence[str], settings: Sequence[Setting]) -> list[list[samples_lib.Sample]]:
  """The samples of each setting, those of the first prompt first; all are drawn together, but for BATCH_SIZE."""
  from textgen_jax import generator

  source = generator.Generator(
    trained.model, trained.params, trained.tokenizer, begins_document=trained.experiment.training.mask_documents
  )
  each = [one.params for one in settings for _ in prompts]
  completions = iter(source.generate([*prompts] * len(settings), each, batch_size=BATCH_SIZE, progress=sys.stderr.isatty()))
  return [[_sample(next(completions)) for _ in range(len(prompts) * one.params.num_samples)] for one in settings]


def _sample(completion: Any) -> samples_lib.Sample:
  entropy, log_prob, drawn = (
    float(np.mean(nats)) for nats in (completion.entropies, completion.log_probs, completion.drawn_log_probs)
  )
  return samples_lib.Sample(completion.text, entropy, log_prob, 0.0 - drawn)


def read_references(trained: Any, splits: dict[str, tokens.Split], length: int) -> dict[str, list[samples_lib.Sample]]:
  """Excerpts of train and, where it's long enough, val, of `length` tokens each; none overlap.

  Raises:
    UserError: the training text is shorter than that.
  """
  found = {name: read_excerpts(trained, splits[name].tokens, length) for name in ('train', 'val') if name in splits}
  if not found['train']:
    size = len(splits['train'].tokens) - 1  # the first is only read
    raise errors.UserError(f'max_new_tokens={length} is above the {size} tokens of the training text, which samples are compared to')
  return {name: excerpts for name, excerpts in found.items() if excerpts}


def read_excerpts(trained: Any, ids: np.ndarray, length: int) -> list[samples_lib.Sample]:
  """Up to EXCERPTS, evenly spaced, and what the model makes of each."""
  from textgen_jax.tools import evaluate as evaluate_tool
  from textgen_jax.training import evaluate

  reading = evaluate_tool.reading(trained)
  # The first excerpt has a whole context before it too, where there is room, so that all are read alike.
  first = max(1, min(reading.length, len(ids) - length))
  count = min(EXCERPTS, (len(ids) - first) // length)
  excerpts = []
  for i in range(count):
    start = first + i * ((len(ids) - first) // count)
    part = np.asarray(ids[max(0, start - reading.length) : start + length])
    split = tokens.Split(part, np.zeros(0, tokens.DOCUMENT), (tokens.Range(0, len(part), 1.0),))
    nats_T2 = np.zeros((len(part), 2))
    for places, values in evaluate.token_losses(
      trained.model, trained.params, split, reading, batch_size=evaluate_tool.BATCH_SIZE, measure=evaluate.nll_and_entropy
    ):
      nats_T2[places] = values
    loss, entropy = nats_T2[-length:].mean(axis=0)
    excerpts.append(samples_lib.Sample(trained.tokenizer.decode(part[-length:]), float(entropy), -float(loss)))
  return excerpts


def read_words(tokenizer: base.Tokenizer, split: tokens.Split) -> set[str]:
  """Every word of a split, a document at a time."""
  starts = split.documents['start']
  known: set[str] = set()
  for start, stop in zip(starts, [*starts[1:], len(split.tokens)], strict=True):
    known.update(words.split(tokenizer.decode(split.tokens[start:stop])))
  return known


def table(rows: Sequence[samples_lib.Row], errors_too: bool = False) -> list[list[str]]:
  """Cells: a row each, under the statistics' headings; with standard errors above 0, if they are asked for."""

  def cell(one: samples_lib.Estimate | None, form: str) -> str:
    if one is None:
      return '-'
    return format(one.mean, form) + (f' ± {one.stderr:{form}}' if errors_too and one.stderr else '')

  known = samples_lib.STATISTICS
  head = ['', 'samples', *(statistic.heading for statistic in known.values())]
  return [head, *([row.name, str(len(row.samples)), *(cell(row.statistics[key], known[key].form) for key in known)] for row in rows)]


def write(directory: pathlib.Path, rows: Sequence[samples_lib.Row], settings: Sequence[Setting], about: dict[str, Any]) -> None:
  """Writes sweep.json, sweep.md and, where matplotlib is there, sweep.png."""
  directory.mkdir(parents=True, exist_ok=True)
  defaults = vars(params.SamplingParams())
  sampling = {one.name: {name: value for name, value in vars(one.params).items() if value != defaults[name]} for one in settings}
  content = {**about, 'rows': [_row(row, sampling.get(row.name)) for row in rows]}
  (directory / 'sweep.json').write_text(json.dumps(content, indent=1, allow_nan=False) + '\n', encoding='utf-8')
  (directory / 'sweep.md').write_text(report.printable('\n'.join(markdown(rows, about))) + '\n', encoding='utf-8')
  report.save_picture(directory / 'sweep.png', (13, 7.5), lambda picture: sweep_picture.plot(picture, rows))


def _row(row: samples_lib.Row, sampling: dict[str, Any] | None) -> dict[str, Any]:
  """A row as JSON has it; `sampling` holds the settings that aren't the defaults."""
  return {
    'name': row.name,
    'sampling': sampling,
    'statistics': {key: one and one._asdict() for key, one in row.statistics.items()},
    'samples': [{**dataclasses.asdict(one), 'loop': (loop := loops.tail(one.text)) and loop._asdict()} for one in row.samples],
  }


def markdown(rows: Sequence[samples_lib.Row], about: dict[str, Any]) -> list[str]:
  """Lines: the table with standard errors, and the beginning of each row's first sample."""
  head, *cells = table(rows, errors_too=True)
  how = f'Step {about["step"]}. ± is the standard error over samples. distinct-n is taken over {about["compared_words"]} words of each.'
  lines = [f'`{about["command"]}`', '', how, '']
  lines += ['| ' + ' | '.join(line) + ' |' for line in (head, ['---'] * len(head), *cells)]
  for row in rows:
    sample = row.samples[0].text
    loop = loops.tail(sample)
    told = f', which ends in {loop.length:,d} characters that repeat every {loop.period:,d}' if loop else ''
    lines += ['', f'## {row.name}', '', f'The beginning of the first text{told}:', '']
    lines += ['    ' + line for line in sample.strip('\n')[:SHOWN_CHARACTERS].splitlines()]
  return lines


if __name__ == '__main__':
  sys.exit(main(sys.argv))
