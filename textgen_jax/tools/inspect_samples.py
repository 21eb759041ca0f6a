"""Sets what a model writes beside what it was trained on: variety, repetition, novelty, and what it copied word for word.

  python -m textgen_jax.tools.inspect_samples --workdir=runs/shakespeare --temperature=0.7 --temperature=1
  python -m textgen_jax.tools.inspect_samples --samples=samples.jsonl --train=plays.txt --val=more_plays.txt --output=report

A table and the longest copies go to stdout; statistics.json and, with matplotlib, statistics.png to --output, which is
WORKDIR/statistics unless it is given. Needs pip install 'textgen_jax[inspect]'.
"""

from textgen_jax import signals

if __name__ == '__main__':
  signals.watch()  # before anything that takes its time to import

import dataclasses
import json
import math
import os
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from textgen_jax import command_line, errors
from textgen_jax.sampling import params
from textgen_jax.statistics import copies, words
from textgen_jax.text import base
from textgen_jax.tools import report

Documents = list[tuple[str, str]]  # names and texts

DISTINCT = range(1, 5)
LONGEST_NGRAM = 8
MAX_TEXT_BYTES = 1 << 31  # what the index of copies can hold
SHOWN_COPIES = 10
SHOWN_CHARACTERS = 100


@dataclasses.dataclass(frozen=True)
class Column:
  """What is known of some texts. What can't be told of so little text is None."""

  name: str
  samples: int
  characters: int
  words: int
  compared_words: int  # the first ones, over which distinct_n and the slope are taken; the same for every column
  distinct_n: list[float | None]  # n = 1..4
  repeated_4_grams: float | None
  zipf_slope: float | None
  zipf_ranks: int | None
  frequencies: list[int]  # of the compared words, the most frequent first
  # None for the training text itself, of which nothing is new and all is copied.
  novelty: list[float | None] | None  # n = 1..8
  longest_copies: list[copies.Copy] | None  # one a sample, empty ones too
  copies: list[tuple[int, copies.Copy]] | None  # the sample's number and a copy of at least --at_least characters


def main(argv: Sequence[str]) -> int:
  return command_line.run(_main, argv)


def _define_flags() -> flags.FlagValues:
  values = flags.FlagValues()
  command_line.define_model_flags(values)
  text = {
    'prompt': ('', 'what each sample begins with, and which is not counted; none: a document start'),
    'output': (None, 'a directory for statistics.json and statistics.png; made where there is none'),
  }
  for name, (default, help_text) in text.items():
    flags.DEFINE_string(name, default, help_text, flag_values=values)
  integers = {
    'num_samples': (20, 'at each temperature'),
    'max_new_tokens': (500, "each sample's length"),
    'seed': (0, 'another seed, another text'),
    'at_least': (50, 'characters: shorter copies are not listed'),
  }
  for name, (number, help_text) in integers.items():
    flags.DEFINE_integer(name, number, help_text, flag_values=values)
  flags.DEFINE_multi_float('temperature', [1.0], 'a column each; may be repeated', flag_values=values)
  files = {
    'samples': 'a file to read instead of drawing: .jsonl, as sample.py writes it, or one text; a column each; may be repeated',
    'train': "the training text, instead of the run's; may be repeated",
    'val': "held-out text, instead of the run's; may be repeated",
  }
  for name, help_text in files.items():
    flags.DEFINE_multi_string(name, [], help_text, flag_values=values)
  return values


def _main(argv: Sequence[str]) -> None:
  values = _define_flags()
  if not command_line.parsed(values, argv, __doc__):
    return
  if not values.workdir and not (values.samples and values.train):
    raise errors.UserError('--workdir is missing: name the directory that train.py wrote to, or files as --samples and --train')
  if values.at_least < 1:
    raise errors.UserError(f'at_least={values.at_least} is not at least 1')
  each = {
    f't={temperature:g}': params.SamplingParams(
      temperature=temperature, num_samples=values.num_samples, max_new_tokens=values.max_new_tokens, seed=values.seed
    )
    for temperature in values.temperature
  }
  report.check_directory(values.output)
  if reserved := {'train', 'val'} & set(values.samples):
    raise errors.UserError(f'samples={min(reserved)!r} is the name of another column: write ./{min(reserved)}')
  samples = {path: read_samples(path) for path in values.samples}
  train, val = read_texts('train', values.train), read_texts('val', values.val)
  if values.workdir and not (samples and train):
    from textgen_jax import compilation, workdir  # after the checks: it takes seconds to import
    from textgen_jax.tools import evaluate

    compilation.keep_compiled()
    trained = workdir.load(values.workdir, values.checkpoint)
    if not samples:
      samples = draw(trained, values.prompt, each)
    if not values.train:
      evaluate.own_text(trained)
      train, held_out = read_splits(trained.experiment.data)
      val = val or held_out
  columns = compare(samples, train, val, values.at_least)
  print(report.printable('\n'.join([*table(columns, values.at_least), '', *list_copies(columns)])))
  output = values.output or (values.workdir and os.path.join(values.workdir, 'statistics'))
  if output:
    write(pathlib.Path(output), columns, values.at_least)


def draw(trained: Any, prompt: str, each: dict[str, params.SamplingParams]) -> dict[str, list[str]]:
  """Samples by their column's name."""
  from textgen_jax.sampling import generate

  begins = trained.experiment.training.mask_documents
  settings = {name: dataclasses.replace(one, begins_document=begins) for name, one in each.items()}
  return {
    name: [sample.text for sample in generate.generate(trained.model, trained.params, trained.tokenizer, [prompt], one)]
    for name, one in settings.items()
  }


def read_splits(config: Any) -> tuple[Documents, Documents]:
  """Train and val of all corpora of a run's `data`."""
  from textgen_jax.data import corpora

  opened = [corpus for corpus, _ in corpora.open_corpora(config)]  # once: own files are read through
  train, val = (
    [
      (f'{corpus.name}/{document.name}' if len(opened) > 1 else document.name, ''.join(part.text for part in document.parts))
      for corpus in opened
      for document in corpus.read(split)
    ]
    for split in ('train', 'val')
  )
  return train, val


def read_texts(flag: str, paths: Sequence[str]) -> Documents:
  """Files by their names, UTF-8 text each."""
  documents = []
  for path in paths:
    try:
      documents.append((path, base.read_bounded(path, MAX_TEXT_BYTES, flag).decode('utf-8-sig').replace('\r\n', '\n')))
    except UnicodeDecodeError as error:
      raise errors.UserError(f"{flag}={path!r} isn't UTF-8 at byte {error.start}") from error
  return documents


def read_samples(path: str) -> list[str]:
  """A .jsonl file's field `text`, line by line; any other file is one sample."""
  text = read_texts('samples', [path])[0][1]
  if not path.endswith('.jsonl'):
    return [text]
  samples = []
  for number, line in enumerate(text.removesuffix('\n').split('\n'), start=1):
    try:
      samples.append(json.loads(line)['text'])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
      raise errors.UserError(f'samples={path!r}, line {number}: not {{"text": ...}}') from error
    if not isinstance(samples[-1], str):
      raise errors.UserError(f'samples={path!r}, line {number}: text={samples[-1]!r} is not a string')
  return samples


def excerpts(documents: Documents, count: int, characters: int) -> list[str]:
  """`count` pieces of so many characters, evenly spaced over the documents; shorter ones where there is too little for all."""
  text = '\n'.join(text for _, text in documents)
  apart = len(text) // count
  return [text[i * apart : i * apart + min(characters, apart)] for i in range(count)]


def compare(samples: dict[str, list[str]], train: Documents, val: Documents, at_least: int) -> list[Column]:
  """A column for each of `samples`, then train and val, of which are taken pieces as long as the samples.

  Raises:
    UserError: there are no words to compare.
  """
  count = max(map(len, samples.values()))
  characters = max(sum(map(len, texts)) // max(1, len(texts)) for texts in samples.values())
  texts = {**samples, 'train': excerpts(train, count, characters)}
  if val:
    texts['val'] = excerpts(val, count, characters)
  split = {name: [words.split(text) for text in each] for name, each in texts.items()}
  totals = {name: sum(map(len, each)) for name, each in split.items()}
  for name, total in totals.items():
    if not total:
      raise errors.UserError(f'{name} holds no words: nothing to compare')
  # Copies first: what it lacks or refuses is told before the words are counted.
  index = copies.CopyIndex(train)
  ngrams = words.NgramIndex(words.split(text) for _, text in train)
  columns = []
  for name, each in texts.items():
    kept = words.cut(split[name], min(totals.values()))
    fit = words.zipf(kept)
    is_train = name == 'train'
    columns.append(
      Column(
        name=name,
        samples=len(each),
        characters=sum(map(len, each)),
        words=totals[name],
        compared_words=sum(map(len, kept)),
        distinct_n=[words.distinct_n(kept, n) for n in DISTINCT],
        repeated_4_grams=words.repetition(split[name]),
        zipf_slope=fit and fit.slope,
        zipf_ranks=fit and fit.ranks,
        frequencies=words.frequencies(kept),
        novelty=None if is_train else ngrams.novelty(split[name], LONGEST_NGRAM),
        longest_copies=None if is_train else [index.longest(text) for text in each],
        copies=None if is_train else [(i, one) for i, text in enumerate(each) for one in index.copies(text, at_least)],
      )
    )
  return columns


def table(columns: Sequence[Column], at_least: int) -> list[str]:
  """Lines: a row for each statistic, a column for each of `columns`."""

  def row(name: str, values: Sequence[float | None], form: str) -> list[str]:
    return [name, *('-' if value is None else format(value, form) for value in values)]

  lengths = [[len(one) for one in c.longest_copies or []] for c in columns]
  rows = [
    ['', *(column.name if len(column.name) <= 24 else '…' + column.name[-23:] for column in columns)],
    row('samples', [c.samples for c in columns], ',d'),
    row('characters', [c.characters for c in columns], ',d'),
    row('words', [c.words for c in columns], ',d'),
    row('words compared', [c.compared_words for c in columns], ',d'),
    *(row(f'distinct-{n}', [c.distinct_n[n - 1] for c in columns], '.3f') for n in DISTINCT),
    row('repeated 4-grams', [c.repeated_4_grams for c in columns], '.1%'),
    row('Zipf slope', [c.zipf_slope for c in columns], '.2f'),
    row('  over ranks 1 to', [c.zipf_ranks for c in columns], ',d'),
    *(row(f'new {n}-grams', [c.novelty[n - 1] if c.novelty else None for c in columns], '.1%') for n in range(1, LONGEST_NGRAM + 1)),
    row('longest copy, characters', [max(each) if each else None for each in lengths], ',d'),
    row('  median over samples', [statistics.median(each) if each else None for each in lengths], ',.0f'),
    row(f'in copies of {at_least} or more', [copied_share(c) for c in columns], '.1%'),
  ]
  return report.aligned(rows)


def copied_share(column: Column) -> float | None:
  """The share of characters that lie in listed copies."""
  return None if column.copies is None else sum(len(one) for _, one in column.copies) / column.characters


def list_copies(columns: Sequence[Column]) -> list[str]:
  """Lines: the longest copies of the columns that were generated, and where they stand."""
  found = [(column.name, i, one) for column in columns if column.name != 'val' for i, one in column.copies or []]
  if not found:
    return ['no copies of that length']
  found.sort(key=lambda row: -len(row[2]))
  lines = [f'the longest of {len(found)} copies (offsets count characters):']
  for name, i, one in found[:SHOWN_COPIES]:
    often = f', which is 1 of {one.occurrences} places' if one.occurrences > 1 else ''
    lines.append(f'{len(one):,d} characters of {name}, sample {i} at {one.sample_offset}: {one.document} at {one.document_offset}{often}')
    lines.append(f'  {_shorten(one.text)}')
  return lines


def _shorten(text: str) -> str:
  if len(text) <= SHOWN_CHARACTERS:
    return repr(text)
  half = SHOWN_CHARACTERS // 2
  return f'{text[:half]!r} … {text[-half:]!r}'


def write(directory: pathlib.Path, columns: Sequence[Column], at_least: int) -> None:
  """Writes statistics.json, and statistics.png where matplotlib is there."""
  directory.mkdir(parents=True, exist_ok=True)
  rows = [{**dataclasses.asdict(c), 'copied_share': copied_share(c)} for c in columns]
  for row in rows:
    row['copies'] = row['copies'] and [{'sample': i, **one} for i, one in row['copies']]
  content = {'at_least': at_least, 'columns': rows}
  (directory / 'statistics.json').write_text(json.dumps(content, indent=1, allow_nan=False) + '\n', encoding='utf-8')
  report.save_picture(directory / 'statistics.png', (11, 8), lambda picture: plot(picture, columns))


def plot(picture: Any, columns: Sequence[Column]) -> None:
  """Four panels: Zipf, novelty, lengths of copies, distinct-n."""
  (zipf, novelty), (lengths, distinct) = picture.subplots(2, 2)
  generated = [column.name for column in columns if column.name not in ('train', 'val')]
  # Text by people is grey and black; temperatures run from cold to hot.
  from matplotlib import colormaps

  styles = {
    name: {'color': colormaps['plasma'](0.1 + 0.7 * i / max(1, len(generated) - 1)), 'marker': 'o'} for i, name in enumerate(generated)
  }
  styles |= {'train': {'color': 'black', 'linestyle': '--', 'marker': 's'}, 'val': {'color': 'grey', 'linestyle': '--', 'marker': 'D'}}
  for column in columns:
    style = {**styles[column.name], 'label': column.name if len(column.name) <= 24 else '…' + column.name[-23:], 'markersize': 4}
    line = {key: value for key, value in style.items() if key not in ('marker', 'markersize')}
    total = sum(column.frequencies)
    zipf.loglog(range(1, len(column.frequencies) + 1), [count / total for count in column.frequencies], **line)
    distinct.plot(DISTINCT, [math.nan if value is None else value for value in column.distinct_n], **style)
    if column.novelty is not None and column.longest_copies is not None:
      novelty.plot(range(1, LONGEST_NGRAM + 1), [math.nan if value is None else value for value in column.novelty], **style)
      # The share of samples whose longest copy is at least x.
      longest = sorted(max(1, len(one)) for one in column.longest_copies)
      lengths.step([1, *longest, longest[-1]], [1.0, *(1 - i / len(longest) for i in range(len(longest))), 0.0], where='pre', **line)
  zipf.set(title='words by rank', xlabel='rank', ylabel='share of words')
  novelty.set(title='n-grams that are not in the training text', xlabel='n, words', ylabel='share', ylim=(-0.03, 1.03))
  lengths.set(title='longest copy of a sample', xlabel='at least so many characters', ylabel='share of samples', ylim=(0, 1.03))
  distinct.set(title='distinct-n, over equally many words', xlabel='n, words', ylabel='distinct n-grams / words', ylim=(0, 1.03))
  distinct.set_xticks(list(DISTINCT))
  lengths.set_xscale('log')
  for axes in (zipf, novelty, lengths, distinct):
    axes.grid(alpha=0.3)
    axes.legend()


if __name__ == '__main__':
  sys.exit(main(sys.argv))
