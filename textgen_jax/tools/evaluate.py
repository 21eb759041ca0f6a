"""Scores a trained model on a split or on a file, as one line of JSON.

  python -m textgen_jax.tools.evaluate --workdir=runs/shakespeare --split=test
  python -m textgen_jax.tools.evaluate --workdir=runs/shakespeare --data=hamlet.txt

Every token but the first is predicted once, in rows that the text alone fixes.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from absl import flags

from textgen_jax import command_line, compilation, errors, workdir
from textgen_jax.data import corpora, prepare
from textgen_jax.training import evaluate

BATCH_SIZE = 64


def main(argv: Sequence[str]) -> int:
  return command_line.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
  values = flags.FlagValues()
  flags.DEFINE_string('workdir', None, 'where the model was trained', flag_values=values)
  flags.DEFINE_string('checkpoint', 'best', 'best (by val loss), latest, or a step', flag_values=values)
  flags.DEFINE_string('split', None, 'val (which is the default) or test, of the text that the model was trained on', flag_values=values)
  flags.DEFINE_string('data', None, 'a file to score instead', flag_values=values)
  if command_line.wants_help(argv):
    print(f'{__doc__}\n{values.get_help()}')
    return
  command_line.parse_flags(values, argv)
  if not values.workdir:
    raise errors.UserError('--workdir is missing: name the directory that train.py wrote to')
  if values.split and values.data:
    raise errors.UserError('--split and --data: give one of them')
  compilation.keep_compiled()
  trained = workdir.load(values.workdir, values.checkpoint)
  split = values.split or 'val'
  tokens = _read(trained, values.data) if values.data else _split(trained, split)
  if len(tokens) < 2:
    raise errors.UserError(f'{values.data or "split=" + split} has {len(tokens)} tokens: at least 2 are needed')
  training = trained.experiment.training
  score = evaluate.evaluate(
    trained.model,
    trained.params,
    tokens,
    trained.tokenizer.byte_lengths(),
    length=training.sequence_length,
    batch_size=BATCH_SIZE,
    row_chunks=evaluate.row_chunks(training.windows == 'contiguous', training.sequence_length),
  )
  row = {
    'loss_nats': score.loss_nats,
    'perplexity': score.perplexity,
    'bits_per_byte': score.bits_per_byte,
    'tokens': score.tokens,
    'bytes': score.bytes,
    'text': values.data or split,
    'step': trained.step,
  }
  print(json.dumps(row))


def _read(trained: workdir.Trained, path: str) -> np.ndarray:
  """A file's tokens."""
  if not pathlib.Path(path).is_file():
    raise errors.UserError(f'data={path!r} is not a file')
  documents = corpora.open_corpus(corpora.DataConfig(path=path)).documents()
  text = ''.join(document.text for split in ('train', 'val') for document in documents[split])
  return trained.tokenizer.encode(text)


def _split(trained: workdir.Trained, split: str) -> np.ndarray:
  """A split's tokens, checked to be those of the tokenizer that the model knows."""
  prepared = prepare.prepare(trained.experiment.data, trained.experiment.tokenizer)
  if split not in prepared.splits:
    raise errors.UserError(f'split={split!r} is none of {", ".join(prepared.splits)}')
  if prepared.fingerprint != trained.fingerprint:
    raise errors.UserError(f'split={split!r}: the text is not the one that the model was trained on; --data=FILE scores any file')
  return prepared.splits[split]


if __name__ == '__main__':
  sys.exit(main(sys.argv))
