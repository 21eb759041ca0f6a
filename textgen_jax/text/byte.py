"""A token for each of the 256 bytes of UTF-8, and one for the end of a text: knows every text, and needs no training."""

import codecs
import os
from collections.abc import Iterable, Sequence

import numpy as np

from textgen_jax import errors
from textgen_jax.text import base


class ByteTokenizer:
  """Ids are the bytes themselves; 256 ends a text."""

  kind = 'byte'
  vocab_size = 257
  standardizes = False

  def __init__(self):
    self.special_ids = {'end_of_text': 256}

  @classmethod
  def train(cls, config: base.TokenizerConfig, texts: Iterable[str]) -> 'ByteTokenizer':
    del config, texts  # nothing to learn
    return cls()

  @classmethod
  def from_fields(cls, fields: dict, where: str) -> 'ByteTokenizer':
    del fields, where  # it is like every other
    return cls()

  def encode(self, text: str) -> np.ndarray:
    # Bytes of an argument that weren't UTF-8 arrive as lone surrogates U+DC80..U+DCFF, and become those bytes again.
    try:
      data = text.encode('utf-8', 'surrogateescape')
    except UnicodeEncodeError as error:
      raise errors.UserError(f'character {text[error.start]!r} at offset {error.start} is half a surrogate pair, not text') from error
    return np.frombuffer(data, np.uint8).astype(np.int32)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Bytes that aren't UTF-8 become U+FFFD."""
    return _to_bytes(ids).decode('utf-8', 'replace')

  def unknowns(self, text: str) -> list[str]:
    del text  # every byte has an id
    return []

  def cut(self, text: str) -> int:
    return len(text)

  def pieces(self) -> list[str]:
    return [chr(i) if 32 <= i < 127 else f'<0x{i:02X}>' for i in range(256)] + [base.END_OF_TEXT]

  def incremental_decoder(self) -> '_ByteDecoder':
    return _ByteDecoder()

  def spelling(self) -> base.Spelling:
    return base.Spelling(((*(bytes([i]) for i in range(256)), b''),), np.zeros((1, self.vocab_size), np.int32))

  def save(self, directory: str | os.PathLike) -> None:
    base.write_fields(directory, self.fields())

  def fingerprint(self) -> str:
    return base.fingerprint(self.fields())

  def fields(self) -> dict:
    return {'format': base.FORMAT, 'kind': self.kind}


class _ByteDecoder:

  def __init__(self):
    self._decoder = codecs.getincrementaldecoder('utf-8')('replace')

  def feed(self, ids: Sequence[int] | np.ndarray) -> str:
    return self._decoder.decode(_to_bytes(ids))

  def flush(self) -> str:
    return self._decoder.decode(b'', final=True)


def _to_bytes(ids: Sequence[int] | np.ndarray) -> bytes:
  ids = base.check_ids(ids, ByteTokenizer.vocab_size)
  return ids[ids < 256].astype(np.uint8).tobytes()
