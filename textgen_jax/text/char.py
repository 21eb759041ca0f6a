"""A token for each character that the training split holds."""

import itertools
import os
from collections.abc import Iterable, Sequence

import numpy as np

from textgen_jax import errors
from textgen_jax.text import base


class CharTokenizer:
  """Ids are places in the sorted characters; then come the unknown symbol, where there is one, and the end of a text.

  No training text holds an unknown character, so the model learns nothing of that id: it keeps a run going, no more.

  Args:
    characters: distinct, in order of code point.
    unknown_symbol: what an unknown character decodes to; empty: such a character is an error.
  """

  kind = 'char'
  standardizes = False

  def __init__(self, characters: str, unknown_symbol: str):
    self._characters = characters
    self._unknown_symbol = unknown_symbol
    self._points = _code_points(characters + unknown_symbol)
    self.vocab_size = len(self._points) + 1
    self.special_ids = {'end_of_text': len(self._points)}
    if unknown_symbol:
      self.special_ids['unknown'] = len(characters)
    # Code point to id, with one more place that catches every point above the largest: 6 times faster than a search.
    points = self._points[: len(characters)]
    self._ids = np.full(int(points.max()) + 2, self.special_ids.get('unknown', -1), np.int32)
    self._ids[points] = np.arange(len(characters))

  @classmethod
  def train(cls, config: base.TokenizerConfig, texts: Iterable[str]) -> 'CharTokenizer':
    """Learns the characters of `texts`, the training split."""
    found: set[str] = set()
    for text in texts:
      found.update(text)
    characters = ''.join(sorted(found))
    if not characters:
      raise errors.UserError('tokenizer.kind=char needs a training text of at least 1 character')
    surrogate = base.first_surrogate(characters)
    if surrogate >= 0:
      raise errors.UserError(f'the training text holds {characters[surrogate]!r}, half a surrogate pair, which is not text')
    return cls(characters, config.unknown_symbol)

  @classmethod
  def from_fields(cls, fields: dict, where: str) -> 'CharTokenizer':
    base.check_fields(fields, {'characters': str, 'unknown_symbol': str}, where)
    characters, symbol = fields['characters'], fields['unknown_symbol']
    if not characters or any(a >= b for a, b in itertools.pairwise(characters)):
      raise errors.UserError(f'{where}: characters must be at least one, distinct and in order of code point')
    if len(symbol) > 1:
      raise errors.UserError(f'{where}: unknown_symbol={symbol!r:.60} must be empty or one character')
    surrogate = base.first_surrogate(characters + symbol)
    if surrogate >= 0:
      raise errors.UserError(f'{where}: {(characters + symbol)[surrogate]!r} is half a surrogate pair, not a character')
    return cls(characters, symbol)

  def encode(self, text: str) -> np.ndarray:
    points = _code_points(text)
    ids = self._ids[np.minimum(points, len(self._ids) - 1)]
    if not self._unknown_symbol and ids.size and ids.min() < 0:
      offset = int(np.argmax(ids < 0))
      raise errors.UserError(
          f"character {text[offset]!r} at offset {offset} isn't among the {len(self._characters)} of the training text:"
          f' set tokenizer.unknown_symbol to a character that stands for it, or tokenizer.kind=byte'
      )
    return ids

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    ids = base.check_ids(ids, self.vocab_size)
    return self._points[ids[ids < len(self._points)]].tobytes().decode('utf-32-le')

  def unknowns(self, text: str) -> list[str]:
    unknown = self.special_ids.get('unknown', -1)
    return [text[i] for i in np.flatnonzero(self.encode(text) == unknown)]

  def cut(self, text: str) -> int:
    return len(text)

  def pieces(self) -> list[str]:
    return [*self._characters, *(['<unk>'] if self._unknown_symbol else []), base.END_OF_TEXT]

  def incremental_decoder(self) -> '_CharDecoder':
    return _CharDecoder(self)

  def spelling(self) -> base.Spelling:
    texts = (*(c.encode() for c in self._characters + self._unknown_symbol), b'')
    return base.Spelling((texts,), np.zeros((1, self.vocab_size), np.int32))

  def save(self, directory: str | os.PathLike) -> None:
    base.write_fields(directory, self.fields())

  def fingerprint(self) -> str:
    return base.fingerprint(self.fields())

  def fields(self) -> dict:
    return {
        'format': base.FORMAT,
        'kind': self.kind,
        'characters': self._characters,
        'unknown_symbol': self._unknown_symbol,
    }


class _CharDecoder:
  """Every token is whole characters, so nothing waits."""

  def __init__(self, tokenizer: CharTokenizer):
    self._tokenizer = tokenizer

  def feed(self, ids: Sequence[int] | np.ndarray) -> str:
    return self._tokenizer.decode(ids)

  def flush(self) -> str:
    return ''


def _code_points(text: str) -> np.ndarray:
  # Lone surrogates (bytes of an argument that weren't UTF-8) pass, and turn out to be unknown characters.
  return np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), '<u4')
