"""Scores a trained model on a split or on any text, as one line of JSON.

  python -m textgen_jax.tools.evaluate --workdir=runs/shakespeare --split=test
  python -m textgen_jax.tools.evaluate --workdir=runs/shakespeare --data=hamlet.txt --documents

Every token is predicted once, in rows that the text alone fixes. A Transformer's rows overlap, so that
each token has at least context - stride tokens before it in the text (at its beginning, all there are); an
LSTM that was trained to carry its state carries it over rows of about 8,192 tokens, warmed up before each.
Bits per byte and per character and word perplexity charge what has no id with its spelling, so that models
with different tokenizers can be compared.
Standard errors are over documents. --documents writes a line for each of them before the last line.
"""

from textgen_jax import signals

if __name__ == '__main__':
  signals.watch()  # before anything that takes its time to import

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from absl import flags

from textgen_jax import command_line, errors
from textgen_jax.data import files, prepare

if TYPE_CHECKING:  # what imports JAX is imported where it is used, after the flags are checked
  from textgen_jax import workdir
  from textgen_jax.training import evaluate

BATCH_SIZE = 64


def main(argv: Sequence[str]) -> int:
  return command_line.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
  values = flags.FlagValues()
  command_line.define_model_flags(values)
  flags.DEFINE_string('split', None, 'val (which is the default) or test, of the text that the model was trained on', flag_values=values)
  flags.DEFINE_string('data', None, 'text to score instead: what data.path takes', flag_values=values)
  flags.DEFINE_string('field', 'text', 'of a .jsonl line in --data: what holds its text', flag_values=values)
  flags.DEFINE_integer('stride', 0, 'tokens from one row to the next; 0: half of the trained context', flag_values=values)
  flags.DEFINE_integer('batch_size', BATCH_SIZE, 'rows at once; changes speed and memory alone', flag_values=values)
  flags.DEFINE_bool('documents', False, 'a line for each document too', flag_values=values)
  if not command_line.parsed(values, argv, __doc__):
    return
  command_line.need_workdir(values)
  if values.split and values.data:
    raise errors.UserError('--split and --data: give one of them')
  if values.batch_size < 1:
    raise errors.UserError(f'batch_size={values.batch_size} is below 1')
  from textgen_jax import compilation, workdir
  from textgen_jax.training import evaluate

  compilation.keep_compiled()
  trained = workdir.load(values.workdir, values.checkpoint)
  how = reading(trained, values.stride)
  opened = prepared_text(trained, values.data, values.field) if values.data else _split_text(trained, values.split or 'val')
  with opened as (prepared, split):
    text = prepared.splits[split]
    if not text.documents['tokens'].sum():
      raise errors.UserError(f'{values.data or "split=" + split} has no token to score')
    score = evaluate.evaluate(
      trained.model, trained.params, text, how, standardizes=trained.tokenizer.standardizes, batch_size=values.batch_size
    )
    if values.documents:
      for i, name in enumerate(prepared.names(split)):
        if score.documents['tokens'][i]:
          print(json.dumps({'document': name, **score.of(i).summary()}))
  what = {'text': values.data or split, 'replies_only': text.is_reply is not None}
  print(json.dumps({**score.summary(), **what, 'step': trained.step, 'stride': how.stride or None}))  # no stride: the state is carried


def reading(trained: 'workdir.Trained', stride: int = 0) -> 'evaluate.Reading':
  """How a trained model reads a text to be scored; at stride 0, rows overlap by half."""
  from textgen_jax.training import evaluate

  training = trained.experiment.training
  length, carried = training.sequence_length, training.windows == 'contiguous'
  if stride and carried:
    raise errors.UserError(f'stride={stride}: this model carries its state, so its rows have no stride')
  if not 0 <= stride <= length:
    raise errors.UserError(f'stride={stride} is not in [1, {length}], the tokens that the model was trained on at a time')
  end_of_text = trained.tokenizer.special_ids['end_of_text'] if training.mask_documents else None
  return evaluate.Reading(length=length, stride=0 if carried else stride or max(1, length // 2), carried=carried, end_of_text=end_of_text)


@contextlib.contextmanager
def prepared_text(trained: 'workdir.Trained', path: str, field: str) -> Iterator[tuple[prepare.PreparedData, str]]:
  """Any text in the model's ids."""
  corpus = files.open_files(path, field, val_fraction=1.0)
  with prepare.tokenized(corpus, trained.tokenizer) as prepared:
    yield prepared, 'val'


@contextlib.contextmanager
def _split_text(trained: 'workdir.Trained', split: str) -> Iterator[tuple[prepare.PreparedData, str]]:
  """A split, checked to be in the ids that the model knows."""
  prepared = own_text(trained)
  if split not in prepared.splits:
    raise errors.not_among('split', split, prepared.splits)
  yield prepared, split


def own_text(trained: 'workdir.Trained') -> prepare.PreparedData:
  """What the model was trained on, checked to be just that."""
  prepared = prepare.prepare(trained.experiment.data, trained.experiment.tokenizer)
  if prepared.fingerprint != trained.fingerprint:
    name = prepared.description['corpus']
    raise errors.UserError(f"{name}: this isn't the text that the model was trained on; name a file with --data or --train")
  return prepared


if __name__ == '__main__':
  sys.exit(main(sys.argv))
