"""What a tokenizer is, and what all kinds share."""

import dataclasses
import hashlib
import json
import os
import pathlib
import stat
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from textgen_jax import errors

FILE_NAME = 'tokenizer.json'
FORMAT = 2  # of that file
END_OF_TEXT = '<|endoftext|>'  # how people read that id
MAX_FILE_BYTES = 64 << 20  # every Unicode character, escaped, takes 13 MiB
MAX_WORDS = 1 << 21  # of any tokenizer; a file with more commas isn't parsed, which would take gigabytes
_MAX_BRACKETS = 16  # an object, a list, and one of either as a token


@dataclasses.dataclass(kw_only=True)
class TokenizerConfig:
  kind: str = 'char'         # char | byte | word | sentencepiece
  unknown_symbol: str = ''   # char only: stands for every character not in the training split; empty: such a one is an error
  vocab_size: int = 0        # ids in all. word, 0: as many as coverage asks for; sentencepiece, 0: at most 4096, or a loaded model's own
  coverage: float = 0.97     # word only, at vocab_size=0: the fewest words that make up this share of the training split's
  standardize: bool = False  # word only: NFKC, lower case, white space as single spaces; then no bits per byte can be told
  model_type: str = 'bpe'    # sentencepiece only: bpe | unigram
  model_path: str = ''       # sentencepiece only: a .model to load instead of training one


class IncrementalDecoder(Protocol):
  """Decodes a stream of ids; what it gives, joined, is `decode` of all of them."""

  def feed(self, ids: Sequence[int] | np.ndarray) -> str:
    """The text that `ids` complete; never half a character."""

  def flush(self) -> str:
    """What is left when the stream ends; the decoder starts anew."""


class Spelling(NamedTuple):
  """What every token adds to the text, as UTF-8, which may depend on a context that the tokens before it leave."""

  texts: tuple[tuple[bytes, ...], ...]  # [context][id]; context 0 is a stream's start
  next_CV: np.ndarray                   # the context after each token, int32 [C, V]

  def context(self, ids: Sequence[int] | np.ndarray) -> int:
    """The context that `ids` leave."""
    context = 0
    for i in check_ids(ids, self.next_CV.shape[1]).tolist():
      context = int(self.next_CV[context, i])
    return context


class Tokenizer(Protocol):
  """Text to ids in [0, vocab_size) and back.

  `special_ids['end_of_text']` stands before every document and after the last, decodes to nothing, and is never encoded from text;
  an empty prompt is it. `special_ids['unknown']`, where there is one, stands for what has no id of its own.
  """

  kind: str
  vocab_size: int
  special_ids: dict[str, int]
  standardizes: bool  # encoding loses what standardising took away, so that bits per byte would mean nothing

  def __hash__(self) -> int: ...

  def encode(self, text: str) -> np.ndarray:
    """Ids of `text`, int32 [N]. Raises UserError for what has no id."""

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Text of `ids`. Raises UserError for ids outside the vocabulary."""

  def unknowns(self, text: str) -> list[str]:
    """The pieces of `text` that `encode` makes 'unknown', in order: a score charges their spelling."""

  def cut(self, text: str) -> int:
    """The last place where `text` can be cut so that its parts, encoded apart, give the ids of the whole, whatever follows; 0: nowhere."""

  def pieces(self) -> list[str]:
    """Each id as text for people to read, in the ids' order."""

  def incremental_decoder(self) -> IncrementalDecoder:
    """A decoder for streaming."""

  def spelling(self) -> Spelling:
    """The bytes behind the decoder's text: joined, and decoded with errors='replace', they are `decode`'s."""

  def fields(self) -> dict[str, Any]:
    """Everything that decides ids and text, as JSON: what `build.from_fields` takes."""

  def save(self, directory: str | os.PathLike) -> None:
    """Writes `fields` as a JSON file into `directory`, which is made where it is missing."""

  def fingerprint(self) -> str:
    """SHA-256 (hex) of everything that decides ids and text."""


def check_ids(ids: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
  """`ids` as a flat int64 array; raises UserError for one outside the vocabulary, which would wrap or clip, silently."""
  ids = np.asarray(ids).astype(np.int64).reshape(-1)
  if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
    raise errors.UserError(f'token ids span [{ids.min()}, {ids.max()}], outside the vocabulary [0, {vocab_size})')
  return ids


def first_surrogate(text: str) -> int:
  """Where the first lone surrogate is; -1: nowhere."""
  try:
    text.encode('utf-8')  # 6 times faster than a search
  except UnicodeEncodeError as error:
    return error.start
  return -1


def read_bounded(path: str | os.PathLike, max_bytes: int, field: str) -> bytes:
  """A regular file's content. Raises UserError, which begins with `field` and the path, for what can't be read or is larger."""
  try:
    with open(path, 'rb', opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:  # a pipe without a writer would wait
      if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise errors.UserError(f'{field}={str(path)!r} is not a regular file')
      data = file.read(max_bytes + 1)
  except (OSError, ValueError) as error:  # ValueError: a NUL in the path
    raise errors.UserError(f"{field}={str(path)!r} can't be read: {getattr(error, 'strerror', None) or error}") from error
  if len(data) > max_bytes:
    raise errors.UserError(f'{field}={str(path)!r} is too large: it has more than {max_bytes} bytes')
  return data


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
  """What each token adds to the text; joined they are its text. One that only begins a character adds nothing."""
  decoder = tokenizer.incremental_decoder()
  texts = [decoder.feed([i]) for i in ids]
  if texts:
    texts[-1] += decoder.flush()
  return texts


def fingerprint(fields: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def write_fields(directory: str | os.PathLike, fields: dict[str, Any]) -> None:
  """Writes a tokenizer's JSON; a reader never sees half of it."""
  path = pathlib.Path(directory) / FILE_NAME
  temporary = path.with_name(f'{FILE_NAME}.{os.getpid()}.tmp')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(fields, sort_keys=True) + '\n', encoding='utf-8')
    temporary.replace(path)
  except OSError as error:
    raise errors.MachineFailed(f"can't write {path}: {error.strerror}") from error


def read_fields(directory: str | os.PathLike) -> Any:
  """A tokenizer's JSON, whatever it holds; what no tokenizer has so much of is refused unparsed."""
  path = pathlib.Path(directory) / FILE_NAME
  data = read_bounded(path, MAX_FILE_BYTES, 'tokenizer')
  if max(data.count(b'['), data.count(b'{')) > _MAX_BRACKETS or data.count(b',') > MAX_WORDS + _MAX_BRACKETS:
    raise errors.UserError(f'{path} is no tokenizer file: it has more brackets or commas than any')
  try:
    return json.loads(data)
  except (ValueError, RecursionError) as error:
    raise errors.UserError(f"{path} isn't JSON: {error}") from error


def check_fields(fields: Any, types: dict[str, type], where: str | os.PathLike) -> None:
  """Raises UserError, which begins with `where`, unless `fields` is an object that has those of `types`, with just that type."""
  if not isinstance(fields, dict):
    raise errors.UserError(f'{where} must hold a JSON object, not {type(fields).__name__}')
  for name, wanted in types.items():
    if type(fields.get(name)) is not wanted:
      raise errors.UserError(f'{where}: {name}={fields.get(name)!r:.60} must be of type {wanted.__name__}')
