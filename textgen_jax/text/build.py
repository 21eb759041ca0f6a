"""The kinds of tokenizers by name: trained, loaded, checked."""

import difflib
import os
import pkgutil
from collections.abc import Sequence

from textgen_jax import errors
from textgen_jax.text import base

# By dotted name, so that a kind's own dependencies load only where it is used.
KINDS = {
    'byte': 'textgen_jax.text.byte:ByteTokenizer',
    'char': 'textgen_jax.text.char:CharTokenizer',
}


def check(config: base.TokenizerConfig) -> None:
  """Raises UserError for what no training text could satisfy."""
  if config.kind not in KINDS:
    near = difflib.get_close_matches(str(config.kind), KINDS, n=1, cutoff=0)[0]
    raise errors.UserError(f"tokenizer.kind={config.kind} isn't one of {', '.join(KINDS)}: did you mean {near}?")
  symbol = config.unknown_symbol
  if symbol and config.kind != 'char':
    raise errors.UserError(f'tokenizer.unknown_symbol={symbol!r} is for tokenizer.kind=char only, not {config.kind}')
  if len(symbol) > 1 or '\ud800' <= symbol <= '\udfff':
    raise errors.UserError(f'tokenizer.unknown_symbol={symbol!r} must be empty or one character')


def train(config: base.TokenizerConfig, texts: Sequence[str]) -> base.Tokenizer:
  """A tokenizer fitted to `texts`, the documents of the training split."""
  check(config)
  return pkgutil.resolve_name(KINDS[config.kind]).train(config, texts)


def load(directory: str | os.PathLike) -> base.Tokenizer:
  """The tokenizer that `save` wrote there. Raises UserError for a file that isn't one."""
  kind = base.read_fields(directory, {'kind': str, 'format': int})
  if kind['format'] != 1 or kind['kind'] not in KINDS:
    raise errors.UserError(
        f"{os.path.join(directory, base.FILE_NAME)}: kind={kind['kind']!r:.60}, format={kind['format']} is unknown;"
        f" this version reads format 1 of {', '.join(KINDS)}"
    )
  return pkgutil.resolve_name(KINDS[kind['kind']]).load(directory)
