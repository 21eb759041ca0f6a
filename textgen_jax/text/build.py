"""The kinds of tokenizers by name: trained, loaded, checked."""

import dataclasses
import os
import pkgutil
from collections.abc import Iterable
from typing import Any

from textgen_jax import errors
from textgen_jax.text import base

# By dotted name, so that a kind's own dependencies load only where it is used.
KINDS = {
    'byte': 'textgen_jax.text.byte:ByteTokenizer',
    'char': 'textgen_jax.text.char:CharTokenizer',
    'word': 'textgen_jax.text.word:WordTokenizer',
    'sentencepiece': 'textgen_jax.text.sentencepiece:SentencePieceTokenizer',
}

MODEL_TYPES = ('bpe', 'unigram')

# Which kinds read a field; set for another, it would be ignored.
READ_BY = {
    'unknown_symbol': ('char',),
    'vocab_size': ('word', 'sentencepiece'),
    'coverage': ('word',),
    'standardize': ('word',),
    'model_type': ('sentencepiece',),
    'model_path': ('sentencepiece',),
}


def check(config: base.TokenizerConfig) -> None:
  """Raises UserError for what no training text could satisfy."""
  if config.kind not in KINDS:
    raise errors.not_among('tokenizer.kind', config.kind, KINDS)
  for field in dataclasses.fields(config):
    value, kinds = getattr(config, field.name), READ_BY.get(field.name, KINDS)
    if config.kind not in kinds and value != field.default:
      raise errors.UserError(f'tokenizer.{field.name}={value!r} is for tokenizer.kind={" or ".join(kinds)} only, not {config.kind}')
  symbol = config.unknown_symbol
  if len(symbol) > 1 or '\ud800' <= symbol <= '\udfff':
    raise errors.UserError(f'tokenizer.unknown_symbol={symbol!r} must be empty or one character')
  if config.vocab_size < 0:
    raise errors.UserError(f'tokenizer.vocab_size={config.vocab_size} is below 0')
  if not 0 < config.coverage <= 1:
    raise errors.UserError(f'tokenizer.coverage={config.coverage} is not in (0, 1]')
  if config.model_type not in MODEL_TYPES:
    raise errors.not_among('tokenizer.model_type', config.model_type, MODEL_TYPES)


def train(config: base.TokenizerConfig, texts: Iterable[str]) -> base.Tokenizer:
  """A tokenizer fitted to the training split, whose `texts` are documents or parts of them that end with a line; read once."""
  check(config)
  return pkgutil.resolve_name(KINDS[config.kind]).train(config, texts)


def load(directory: str | os.PathLike) -> base.Tokenizer:
  """The tokenizer that `save` wrote there. Raises UserError for a file that isn't one."""
  return from_fields(base.read_fields(directory), os.path.join(directory, base.FILE_NAME))


def from_fields(fields: Any, where: str) -> base.Tokenizer:
  """The tokenizer whose `fields` these are. Raises UserError, which begins with `where`, for anything else."""
  base.check_fields(fields, {'kind': str, 'format': int}, where)
  kind = fields['kind']
  if fields['format'] != base.FORMAT or kind not in KINDS:
    raise errors.UserError(
        f"{where}: kind={kind[:60]!r}, format={fields['format']!r:.60} is unknown;"
        f" this version reads format {base.FORMAT} of {', '.join(KINDS)}"
    )
  return pkgutil.resolve_name(KINDS[kind]).from_fields(fields, where)
