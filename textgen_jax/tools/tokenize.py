"""Trains tokenizers on a corpus, compares them, and shows how they cut a text.

  python -m textgen_jax.tools.tokenize --corpus=shakespeare
  python -m textgen_jax.tools.tokenize --data=my.txt --kind=sentencepiece --vocab_size=8000 --save=tokenizer
  python -m textgen_jax.tools.tokenize --workdir=runs/shakespeare --text='To be, or not to be'

The table has a line for each kind, trained on the training split and measured on val: ids in the vocabulary,
bytes that a token stands for, tokens per byte, the share of the vocabulary that val uses, tokens that are
unknown, the share of documents that decoding gives back as they are, and the longest tokens.
"""

from textgen_jax import signals

if __name__ == '__main__':
  signals.watch()  # before anything that takes its time to import

import itertools
import os
import sys
from collections.abc import Sequence

import numpy as np
from absl import flags

from textgen_jax import command_line, errors
from textgen_jax.data import corpora, prepare
from textgen_jax.text import base, build

CHECKED_DOCUMENTS = 100  # of val, decoded and compared


def main(argv: Sequence[str]) -> int:
  return command_line.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
  values, default = flags.FlagValues(), base.TokenizerConfig()
  flags.DEFINE_string('corpus', None, 'a name that python -m textgen_jax.tools.corpora lists', flag_values=values)
  flags.DEFINE_string('data', None, 'own text instead: what data.path takes', flag_values=values)
  flags.DEFINE_string('field', 'text', 'of a .jsonl line in --data: what holds its text', flag_values=values)
  flags.DEFINE_string('workdir', None, "a trained model's tokenizer instead", flag_values=values)
  flags.DEFINE_multi_string('kind', [], f'{", ".join(build.KINDS)}; may be repeated; none: all', flag_values=values)
  flags.DEFINE_integer('vocab_size', default.vocab_size, 'of word and sentencepiece, as tokenizer.vocab_size', flag_values=values)
  flags.DEFINE_float('coverage', default.coverage, 'of word, as tokenizer.coverage', flag_values=values)
  flags.DEFINE_bool('standardize', default.standardize, 'of word, as tokenizer.standardize', flag_values=values)
  flags.DEFINE_string('model_type', default.model_type, 'of sentencepiece: bpe or unigram', flag_values=values)
  flags.DEFINE_string('model_path', default.model_path, 'of sentencepiece: a .model instead of training one', flag_values=values)
  flags.DEFINE_string('unknown_symbol', default.unknown_symbol, 'of char, as tokenizer.unknown_symbol', flag_values=values)
  flags.DEFINE_multi_string('text', [], 'a text to cut into tokens; may be repeated', flag_values=values)
  flags.DEFINE_integer('longest', 5, 'how many of the longest tokens to show', lower_bound=0, flag_values=values)
  flags.DEFINE_string('save', None, 'a directory for tokenizer.json (one kind)', flag_values=values)
  if not command_line.parsed(values, argv, __doc__):
    return
  if sum(map(bool, (values.corpus, values.data, values.workdir))) != 1:
    raise errors.UserError('--corpus, --data or --workdir: give one of them')
  if values.save and (len(values.kind) != 1 and not values.workdir):
    raise errors.UserError(f'--save={values.save} takes one tokenizer: add one --kind, such as --kind=sentencepiece')
  if values.save and os.path.exists(values.save) and not os.path.isdir(values.save):
    raise errors.UserError(f'--save={values.save} is a file: name a directory')
  kinds = values.kind or list(build.KINDS)
  for name, readers in build.READ_BY.items():
    if values[name].present and not set(kinds) & set(readers):
      raise errors.UserError(f'--{name} is for --kind={" or ".join(readers)} only, not {", ".join(kinds)}')
  if values.workdir:
    if given := [f'--{name}' for name in ('kind', *build.READ_BY) if values[name].present]:
      raise errors.UserError(f'{given[0]} and --workdir: a trained model has its tokenizer already')
    from textgen_jax import workdir  # here: it imports JAX

    trained = workdir.load(values.workdir)
    found = [trained.tokenizer]
    print(f'{trained.tokenizer.kind}: {trained.tokenizer.vocab_size:,} ids, SHA-256 {trained.tokenizer.fingerprint()[:12]}')
    print('longest: ' + '  '.join(longest(trained.tokenizer, values.longest)))
  else:
    found = compare(values)
  for text in values.text:
    for tokenizer in found:
      print(f'{tokenizer.kind}: {cut(tokenizer, text)}')
  if values.save:
    found[0].save(values.save)
    print(f'{os.path.join(values.save, base.FILE_NAME)} is written', file=sys.stderr)


def compare(values: flags.FlagValues) -> list[base.Tokenizer]:
  """Prints the table."""
  data = corpora.DataConfig(path=values.data or '', field=values.field, **({'corpus': values.corpus} if values.corpus else {}))
  corpora.check(data)
  configs = []
  for kind in values.kind or build.KINDS:
    fields = {name: getattr(values, name) for name, kinds in build.READ_BY.items() if kind in kinds}
    configs.append(base.TokenizerConfig(kind=kind, **fields))
    build.check(configs[-1])
  header = ('kind', 'ids', 'bytes/token', 'tokens/byte', 'ids used', 'unknown', 'exact', 'longest tokens')
  print('  '.join(f'{name:>13}' for name in header))
  read = (document for corpus, _ in corpora.open_corpora(data) for document in corpus.read('val'))
  texts = list(itertools.islice((''.join(part.text for part in document.parts) for document in read), CHECKED_DOCUMENTS))
  found, failures = [], []
  for config in configs:
    try:
      prepared = prepare.prepare(data, config)
    except errors.UserError as error:
      failures.append(error)
      print(f'{config.kind:>13}  {error}', flush=True)
      continue
    val, tokenizer = prepared.splits['val'], prepared.tokenizer
    total = {name: int(val.documents[name].sum()) for name in ('bytes', 'unknowns')}
    ids = max(len(val.tokens) - 1 - len(val.documents), 1)  # of text, without the ends
    used = len(np.unique(val.tokens)) / tokenizer.vocab_size
    cells = (
      config.kind, f'{tokenizer.vocab_size:,}', f'{total["bytes"] / ids:.3f}', f'{ids / total["bytes"]:.4f}', f'{used:.1%}',
      f'{total["unknowns"] / ids:.2%}', f'{exact(texts, prepared):.1%}',
    )  # fmt: skip
    print('  '.join(f'{cell:>13}' for cell in cells) + '  ' + '  '.join(longest(tokenizer, values.longest)), flush=True)
    found.append(tokenizer)
  if not found:
    raise failures[0]
  return found


def exact(texts: Sequence[str], prepared: prepare.PreparedData) -> float:
  """The share of val's first documents, `texts`, that decoding gives back as they are."""
  val = prepared.splits['val']
  stops = [*val.documents['start'][1:], len(val.tokens) - 1]
  spans = zip(texts, val.documents['start'], stops, strict=False)
  return sum(prepared.tokenizer.decode(val.tokens[start:stop]) == text for text, start, stop in spans) / len(texts)


def longest(tokenizer: base.Tokenizer, count: int) -> list[str]:
  pieces = {piece: None for i, piece in enumerate(tokenizer.pieces()) if i not in tokenizer.special_ids.values()}
  return [repr(piece) for piece in sorted(pieces, key=len, reverse=True)[:count]]


def cut(tokenizer: base.Tokenizer, text: str) -> str:
  ids = [int(i) for i in tokenizer.encode(text)]
  return ' '.join(f'{piece!r}:{i}' for piece, i in zip(base.token_texts(tokenizer, ids), ids, strict=True)) + f'  ({len(ids)} tokens)'


if __name__ == '__main__':
  sys.exit(main(sys.argv))
