"""What a trained model makes of a text, token by token.

  python -m textgen_jax.tools.score --workdir=runs/shakespeare --text='To be, or not to be'
  python -m textgen_jax.tools.score --workdir=runs/shakespeare --data=hamlet.txt --format=color

--format=jsonl writes a line for each text: its tokens, their pieces of text and log-probabilities (nats), and
that of its end. --format=color shows the text, each token on a colour from green (expected) over yellow to
red (a surprise). Texts are scored apart: none sees another. --tokens takes ids instead of text.
"""

from textgen_jax import signals

if __name__ == '__main__':
  signals.watch()  # before anything that takes its time to import

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from textgen_jax import command_line, errors
from textgen_jax.data import documents, prepare, tokens
from textgen_jax.text import base
from textgen_jax.tools import evaluate as evaluate_tool

if TYPE_CHECKING:  # what imports JAX is imported where it is used, after the flags are checked
  from textgen_jax import workdir

# Backgrounds of the 256-colour terminal palette: a step for each `COLOR_BITS` of surprise.
COLORS = (22, 28, 64, 100, 136, 172, 166, 160, 124)
COLOR_BITS = 1.5


def main(argv: Sequence[str]) -> int:
  return command_line.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
  values = flags.FlagValues()
  command_line.define_model_flags(values)
  flags.DEFINE_multi_string('text', [], 'a text to score; may be repeated', flag_values=values)
  flags.DEFINE_string('data', None, 'texts to score: what data.path takes', flag_values=values)
  flags.DEFINE_string('field', 'text', 'of a .jsonl line in --data: what holds its text', flag_values=values)
  flags.DEFINE_list('tokens', [], 'ids to score, with commas between them', flag_values=values)
  flags.DEFINE_string('format', 'jsonl', 'jsonl or color', flag_values=values)
  if not command_line.parsed(values, argv, __doc__):
    return
  command_line.need_workdir(values)
  if sum(map(bool, (values.text, values.data, values.tokens))) != 1:
    raise errors.UserError('--text, --data or --tokens: give one of them')
  if '' in values.text:
    raise errors.UserError("--text='' is an empty document: it has no token to score")
  if values.format not in ('jsonl', 'color'):
    raise errors.not_among('format', values.format, ('jsonl', 'color'))
  from textgen_jax import compilation, workdir

  compilation.keep_compiled()
  trained = workdir.load(values.workdir, values.checkpoint)
  with _read(trained, values) as (names, split):
    for row in score(trained, names, split):
      if values.format == 'jsonl':
        print(json.dumps(row, ensure_ascii=False).encode('utf-8', 'replace').decode())
      else:
        print(colored(row))
  if values.format == 'color':
    print(legend())


@contextlib.contextmanager
def _read(trained: 'workdir.Trained', values: flags.FlagValues) -> Iterator[tuple[list[str], tokens.Split]]:
  """The texts' names, and their tokens."""
  if values.data:
    with evaluate_tool.prepared_text(trained, values.data, values.field) as (prepared, name):
      yield prepared.names(name), prepared.splits[name]
  elif values.text:
    texts = values.text

    def read(split: str) -> Iterator[documents.Document]:
      del split
      return (documents.Document(f'text {i}', [documents.Part(text)]) for i, text in enumerate(texts, start=1))

    with prepare.tokenized(documents.Corpus('text', '', ('val',), read, sum(map(len, texts))), trained.tokenizer) as prepared:
      yield prepared.names('val'), prepared.splits['val']
  else:
    yield ['tokens'], _of_ids(trained.tokenizer, values.tokens)


def _of_ids(tokenizer: base.Tokenizer, given: Sequence[str]) -> tokens.Split:
  wrong = [one for one in given if not (one.strip().isdecimal() and len(one) < 20 and int(one) < tokenizer.vocab_size)]
  if wrong:
    raise errors.UserError(f'tokens: {wrong[0]!r:.40} is not an id in the vocabulary [0, {tokenizer.vocab_size})')
  end = tokenizer.special_ids['end_of_text']
  ids = np.array([end, *map(int, given), end], np.int64)
  text = tokenizer.decode(ids)
  record = (0, len(ids) - 1, len(text.encode()), len(text), len(text.split()), 0, 0)
  return tokens.Split(ids, np.array([record], tokens.DOCUMENT), (tokens.Range(0, len(ids), 1.0),))


def score(trained: 'workdir.Trained', names: Sequence[str], split: tokens.Split) -> Iterator[dict[str, Any]]:
  """A row for each document: tokens, their pieces of text, log-probabilities (nats) and those of its end."""
  from textgen_jax.training import evaluate

  end = trained.tokenizer.special_ids['end_of_text']
  reading = dataclasses.replace(evaluate_tool.reading(trained), end_of_text=end)
  log_probs = np.zeros(len(split.tokens), np.float32)
  for places, nats in evaluate.token_losses(trained.model, trained.params, split, reading, batch_size=evaluate_tool.BATCH_SIZE):
    log_probs[places] = -nats
  for name, record in zip(names, split.documents, strict=True):
    inside = slice(int(record['start']) + 1, int(record['start'] + record['tokens']))
    ids = [int(i) for i in split.tokens[inside]]
    yield {
      'document': name,
      'tokens': ids,
      'pieces': base.token_texts(trained.tokenizer, ids),
      'log_probs': [float(x) for x in log_probs[inside]],
      'end_log_prob': float(log_probs[inside.stop]),
      'loss_nats': -float(log_probs[inside.start : inside.stop + 1].astype(np.float64).mean()),
    }


def colored(row: dict[str, Any]) -> str:
  """The text for a terminal, each token on the colour of its surprise."""
  parts = []
  for piece, log_prob in zip(row['pieces'], row['log_probs'], strict=True):
    shown = piece.replace('\r', '').replace('\x1b', '␛') or '·'
    # A line's end is shown as a sign, and colours stop there: terminals paint the rest of the line else.
    body, newline, rest = shown.partition('\n')
    begin, stop = f'\x1b[48;5;{color(-log_prob)}m\x1b[97m', '\x1b[0m'
    parts.append(f'{begin}{body}⏎{stop}\n{rest}' if newline else f'{begin}{body}{stop}')
  return ''.join(parts)


def color(nats: float) -> int:
  return COLORS[min(int(nats / math.log(2) / COLOR_BITS), len(COLORS) - 1)]


def legend() -> str:
  steps = [f'\x1b[48;5;{code}m\x1b[97m {i * COLOR_BITS:g} \x1b[0m' for i, code in enumerate(COLORS)]
  return 'bits of surprise, from: ' + ''.join(steps)


if __name__ == '__main__':
  sys.exit(main(sys.argv))
