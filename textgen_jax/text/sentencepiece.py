"""Pieces of words by the SentencePiece library, trained here or loaded: bytes spell what no piece holds, so that every text comes back."""

import base64
import codecs
import io
import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece  # the library: absolute imports don't see this module
import tqdm

from textgen_jax import errors
from textgen_jax.text import base

DEFAULT_VOCAB_SIZE = 4096
MAX_VOCAB_SIZE = 1 << 20  # above any model's that is known; a file of 48 MiB may claim 24 million pieces
TRAINING_BYTES = 32 << 20  # of text that training keeps: unigram took 108 s and 1.2 GB for 50 MB of English
BLOCK_BYTES = 1 << 16      # what a sample of a larger corpus takes or leaves
MAX_MODEL_BYTES = base.MAX_FILE_BYTES // 4 * 3 - 4096  # base64 of it must fit the file

# The library writes a space as this character, so that text which holds it needs another spelling.
SPACE = '\u2581'
# Lines end at these, too: the library drops a line that holds U+2585, and would learn SPACE as a space.
RESERVED = re.compile(f'[\n\0{SPACE}\u2585]')
# It drops lines of over 4192 bytes, too: they are cut before a space, or anywhere where there is none.
LINE = re.compile(r'.{1,1000}(?= |$)|.{1,1000}', re.DOTALL)
SYMBOLS = ['\n', '\t']   # always pieces of their own: no piece spans a line
NO_DUMMY_PREFIX = b'\x1a\x02\x18\x00'  # normalizer_spec { add_dummy_prefix: false }; what is appended to a protobuf overrides it
FATAL = 3                # the library's log level above all that it tells: its errors arrive as exceptions


class SentencePieceTokenizer:
  """Ids are the model's; one more ends a text where the model has no such piece.

  A model standardizes where it normalises characters or white space: it then encodes as the library does. Of every other model
  with bytes among its pieces, `decode` inverts `encode`: U+2581, which the library takes for a space, and bytes that weren't UTF-8
  are spelled in bytes.

  Args:
    model: a serialized ModelProto, the content of a .model file.
  """

  kind = 'sentencepiece'

  def __init__(self, model: bytes):
    self._model = model
    trainer, normalizer = _specs(model)
    self._processor = _processor(model)
    self._pieces = [self._processor.id_to_piece(i) for i in range(self._processor.piece_size())]
    unknown, end = self._processor.unk_id(), self._processor.eos_id()
    if end < 0:  # also where text can spell it
      end = len(self._pieces)
    self.special_ids = {'end_of_text': end, 'unknown': unknown}
    self.vocab_size = max(len(self._pieces), end + 1)
    self._table = self._texts(trainer.texts.get(44, ' \u2047 '.encode()))
    self._byte_fallback = bool(trainer.numbers.get(35, False))
    # Defaults as in sentencepiece_model.proto, where a dummy prefix and the rest of the white space rules are on.
    self._dummy_prefix = bool(normalizer.numbers.get(3, True))
    merges_spaces, marks_spaces = normalizer.numbers.get(4, True), normalizer.numbers.get(5, True)
    spaces_end_words = trainer.numbers.get(24, False)  # then the dummy prefix is a suffix
    self.standardizes = bool(normalizer.texts.get(2) or merges_spaces or not marks_spaces or spaces_end_words)
    self._spellings: dict[str, list[int]] = {}
    self._prefix, self._cut_at = '', ''
    if not self.standardizes:
      self._spellings = self._spell()
      self._prefix = ' ' if self._dummy_prefix else ''
      self._processor = _processor(model + NO_DUMMY_PREFIX)  # only the text's first part takes a prefix: ours
      self._cut_at = '' if self._dummy_prefix else self._separator()
    special = re.escape(''.join(self._spellings))
    part = {'': '[^{0}]+', '\n': r'[^\n{0}]*\n|[^\n{0}]+', ' ': r' [^ {0}]*|[^ {0}]+'}[self._cut_at]
    self._special = re.compile(f'[{special}]' if special else '(?!)')
    self._parts = re.compile(f'[{special}]|{part.format(special)}' if special else '(?s:.+)')

  @classmethod
  def train(cls, config: base.TokenizerConfig, texts: Iterable[str]) -> 'SentencePieceTokenizer':
    """Learns pieces from `texts`, the training split, or reads `config.model_path`."""
    if config.model_path:
      return cls._read(config)
    if config.vocab_size > MAX_VOCAB_SIZE:
      raise errors.UserError(f'tokenizer.vocab_size={config.vocab_size} is above {MAX_VOCAB_SIZE}')
    blocks, kept, size = _sample(texts)
    lines = _lines(blocks)
    first = next((line for line in lines if line.strip('\t')), '')
    if not first:
      raise errors.UserError('tokenizer.kind=sentencepiece needs a training text of at least 1 character besides line ends and tabs')
    vocab_size = config.vocab_size or DEFAULT_VOCAB_SIZE
    sampled = '' if kept == size else f', a sample of {size / 1e6:,.1f} MB'
    print(f'sentencepiece: learning {vocab_size:,} pieces ({config.model_type}) from {kept / 1e6:,.1f} MB{sampled}', file=sys.stderr)
    return cls(_learn(config, itertools.chain([first], lines)))

  @classmethod
  def _read(cls, config: base.TokenizerConfig) -> 'SentencePieceTokenizer':
    field = f'tokenizer.model_path={config.model_path}'
    model = base.read_bounded(config.model_path, MAX_MODEL_BYTES, 'tokenizer.model_path')
    try:
      tokenizer = cls(model)
    except errors.UserError as error:
      raise errors.UserError(f'{field}: {error}') from error
    if config.vocab_size not in (0, tokenizer.vocab_size):
      raise errors.UserError(f"tokenizer.vocab_size={config.vocab_size} isn't the {tokenizer.vocab_size} of {field}: leave it at 0")
    return tokenizer

  @classmethod
  def from_fields(cls, fields: dict, where: str) -> 'SentencePieceTokenizer':
    base.check_fields(fields, {'model': str}, where)
    try:
      model = base64.b64decode(fields['model'], validate=True)
    except ValueError as error:
      raise errors.UserError(f"{where}: model isn't base64: {error}") from error
    try:
      return cls(model)
    except errors.UserError as error:
      raise errors.UserError(f'{where}: {error}') from error

  def __reduce__(self):
    return type(self), (self._model,)  # the library's object lives in C++

  def encode(self, text: str) -> np.ndarray:
    ids = self._encode_parts(text)[1]
    return np.fromiter(itertools.chain.from_iterable(ids), np.int32, sum(map(len, ids)))

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Bytes that aren't UTF-8 become U+FFFD."""
    return _drop_prefix(self._to_bytes(ids), self._dummy_prefix).decode('utf-8', 'replace')

  def unknowns(self, text: str) -> list[str]:
    if self._byte_fallback:
      return []
    unknown, found = self.special_ids['unknown'], []
    for part, ids in zip(*self._encode_parts(text), strict=True):
      if unknown in ids:
        spelled = [part] if part in self._spellings else [p.replace(SPACE, ' ') for p in self._processor.encode(part, out_type=str)]
        found += [surface for surface, i in zip(spelled, ids, strict=True) if i == unknown]
    return found

  def cut(self, text: str) -> int:
    if self._cut_at == '\n':
      return text.rfind('\n') + 1
    return max(text.rfind(' '), 0) if self._cut_at else 0

  def incremental_decoder(self) -> '_PieceDecoder':
    return _PieceDecoder(self)

  def spelling(self) -> base.Spelling:
    """With a dummy prefix two contexts: before any text, where a leading space is dropped, and after."""
    texts = tuple(self._table)
    if not self._dummy_prefix:
      return base.Spelling((texts,), np.zeros((1, self.vocab_size), np.int32))
    next_CV = np.array([list(map(bool, texts)), [True] * len(texts)], np.int32)
    return base.Spelling((tuple(_drop_prefix(text, True) for text in texts), texts), next_CV)

  def save(self, directory: str | os.PathLike) -> None:
    base.write_fields(directory, self.fields())

  def fingerprint(self) -> str:
    return base.fingerprint(self.fields())

  def pieces(self) -> list[str]:
    """Every id's piece as the model spells it, with U+2581 for a space; what can't be printed is escaped."""
    pieces = self._pieces + [base.END_OF_TEXT] * (self.vocab_size - len(self._pieces))
    return [''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in piece) for piece in pieces]

  def fields(self) -> dict:
    return {'format': base.FORMAT, 'kind': self.kind, 'model': base64.b64encode(self._model).decode()}

  def _encode_parts(self, text: str) -> tuple[list[str], list[list[int]]]:
    """The parts of `text` that are encoded apart, and the ids of each."""
    try:
      text.encode('utf-8', 'surrogateescape' if '\udc80' in self._spellings else 'strict')
    except UnicodeEncodeError as error:
      raise errors.UserError(f'character {text[error.start]!r} at offset {error.start} is half a surrogate pair, not text') from error
    # At every place where `cut` may cut, not only there: a score summed over a long text rounds otherwise than over its parts.
    parts = self._parts.findall(self._prefix + text) if text else []
    if not self._special.search(text):
      return parts, self._processor.encode(parts, out_type=int, num_threads=1)
    ids = self._processor.encode(['' if part in self._spellings else part for part in parts], out_type=int, num_threads=1)
    return parts, [self._spellings.get(part, found) for part, found in zip(parts, ids, strict=True)]

  def _to_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
    return b''.join([self._table[i] for i in base.check_ids(ids, self.vocab_size).tolist()])

  def _texts(self, unknown: bytes) -> list[bytes]:
    """What each id decodes to."""
    texts = []
    for i, piece in enumerate(self._pieces):
      if self._processor.is_control(i):
        texts.append(b'')
      elif self._processor.is_unknown(i):
        texts.append(unknown)
      elif self._processor.is_byte(i):
        texts.append(bytes([int(piece[3:5], 16)]))  # <0x41>
      else:
        texts.append(piece.replace(SPACE, ' ').encode())
    return texts + [b''] * (self.vocab_size - len(texts))

  def _spell(self) -> dict[str, list[int]]:
    """Ids of the characters that the library can't tell from others."""
    if not self._byte_fallback:
      return {SPACE: [self.special_ids['unknown']]}
    byte_ids = {self._table[i][0]: i for i in range(len(self._pieces)) if self._processor.is_byte(i)}
    # Bytes of an argument that weren't UTF-8 arrive as lone surrogates U+DC80..U+DCFF, and become those bytes again.
    return {SPACE: [byte_ids[b] for b in SPACE.encode()]} | {chr(0xDC00 + b): [byte_ids[b]] for b in range(0x80, 0x100)}

  def _separator(self) -> str:
    """After '\\n', or before ' ', no piece goes on; '' where there is no such place."""
    known = set(self._pieces)
    # Unknown characters that follow each other become one piece.
    if not any('\n' in piece[:-1] for piece in known) and (self._byte_fallback or '\n' in known):
      return '\n'
    if not any(SPACE in piece[1:] for piece in known) and (self._byte_fallback or SPACE in known):
      return ' '
    return ''


class _PieceDecoder:

  def __init__(self, tokenizer: SentencePieceTokenizer):
    self._tokenizer = tokenizer
    self._decoder = codecs.getincrementaldecoder('utf-8')('replace')
    self._at_start = True

  def feed(self, ids: Sequence[int] | np.ndarray) -> str:
    data = self._tokenizer._to_bytes(ids)
    text = self._decoder.decode(_drop_prefix(data, self._at_start and self._tokenizer._dummy_prefix))
    self._at_start = self._at_start and not data
    return text

  def flush(self) -> str:
    self._at_start = True
    return self._decoder.decode(b'', final=True)


def _drop_prefix(data: bytes, prefixed: bool) -> bytes:
  return data[1:] if prefixed and data.startswith(b' ') else data


def _processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
  sentencepiece.set_min_log_level(FATAL)
  processor = sentencepiece.SentencePieceProcessor()
  try:
    processor.LoadFromSerializedProto(model)
    for i in range(processor.piece_size()):
      processor.id_to_piece(i)  # UnicodeDecodeError, a ValueError, in a damaged piece
  except (RuntimeError, ValueError) as error:
    raise _damaged(_reason(error)) from error
  return processor


class _Spec:
  """Fields of a message of a serialized protobuf, by their numbers."""

  def __init__(self) -> None:
    self.numbers: dict[int, int] = {}
    self.texts: dict[int, bytes] = {}

  def merge(self, message: bytes) -> None:
    for number, value in _proto_fields(message):
      if isinstance(value, int):
        self.numbers[number] = value
      else:
        self.texts[number] = value


def _specs(model: bytes) -> tuple[_Spec, _Spec]:
  """How the model was trained, and how it normalises text.

  sentencepiece_model_pb2 isn't used: it refuses every protobuf library older than the one that generated it.

  Raises:
    UserError: the file is damaged, or has more pieces than any model.
  """
  specs = {2: _Spec(), 3: _Spec()}
  for count, (number, value) in enumerate(_proto_fields(model)):
    if count > MAX_VOCAB_SIZE:
      raise errors.UserError(f'has more than {MAX_VOCAB_SIZE:,} pieces, as no SentencePiece model does')
    if number in specs and isinstance(value, bytes):
      specs[number].merge(value)
  return specs[2], specs[3]


def _proto_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
  """Number and value of each field; source: protobuf.dev/programming-guides/encoding."""
  place = 0
  while place < len(data):
    key, place = _varint(data, place)
    number, wire_type = key >> 3, key & 7
    if wire_type == 0:
      value, place = _varint(data, place)
      yield number, value
    elif wire_type in (1, 2, 5):
      size, place = _varint(data, place) if wire_type == 2 else ({1: 8, 5: 4}[wire_type], place)
      if place + size > len(data):
        raise _damaged('a field is cut off')
      yield number, data[place : place + size]
      place += size
    else:
      raise _damaged(f'a field has type {wire_type}')


def _varint(data: bytes, place: int) -> tuple[int, int]:
  """A number, and the place behind it."""
  value = shift = 0
  for byte in data[place : place + 10]:  # 64 bits
    value |= (byte & 0x7F) << shift
    shift += 7
    if byte < 0x80:
      return value, place + shift // 7
  raise _damaged('a number is cut off or too long')


def _damaged(why: str) -> errors.UserError:
  return errors.UserError(f"isn't a SentencePiece model, or is damaged: {why}")


def _sample(texts: Iterable[str]) -> tuple[list[bytes], int, int]:
  """Blocks of lines spread evenly over `texts`, their size and that of all, in bytes.

  Every 2^k-th block stays; k grows by one whenever the blocks pass TRAINING_BYTES.
  """
  blocks: list[bytes] = []
  stride, kept, size = 1, 0, 0
  with tqdm.tqdm(unit='B', unit_scale=True, desc='sentencepiece: read', disable=None) as bar:
    for index, block in enumerate(_blocks(texts)):
      size += len(block)
      bar.update(len(block))
      if index % stride:
        continue
      blocks.append(block)
      kept += len(block)
      while kept > TRAINING_BYTES and len(blocks) > 1:
        blocks, stride = blocks[::2], stride * 2
        kept = sum(map(len, blocks))
  return blocks, kept, size


def _blocks(texts: Iterable[str]) -> Iterator[bytes]:
  """`texts` as UTF-8 in blocks of whole lines, about BLOCK_BYTES each; only a line that is longer makes a longer one."""
  waiting = io.BytesIO()
  for text in texts:
    try:
      lines = text.encode().splitlines(keepends=True)
    except UnicodeEncodeError as error:
      raise errors.UserError(f'the training text holds {text[error.start]!r}, half a surrogate pair, which is not text') from error
    for line in lines:
      waiting.write(line)
      if waiting.tell() >= BLOCK_BYTES:
        yield waiting.getvalue()
        waiting = io.BytesIO()
    if lines and not lines[-1].endswith(b'\n'):
      waiting.write(b'\n')
  if waiting.tell():
    yield waiting.getvalue()


def _lines(blocks: list[bytes]) -> Iterator[str]:
  """What the library may see: lines that it doesn't drop. Empties `blocks`, since the library keeps a copy."""
  blocks.reverse()
  while blocks:
    for line in RESERVED.split(blocks.pop().decode()):
      yield from LINE.findall(line)


def _learn(config: base.TokenizerConfig, lines: Iterator[str]) -> bytes:
  written = io.BytesIO()
  vocab_size = config.vocab_size or DEFAULT_VOCAB_SIZE
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=written,
        model_type=config.model_type,
        vocab_size=max(vocab_size, 100),          # less than 4 it refuses in its own terms, and 260 it refuses anyway
        hard_vocab_limit=config.vocab_size > 0,  # the default gives fewer where the text is small
        byte_fallback=True,
        character_coverage=0.9995,               # bytes spell the rarest characters, which would crowd out pieces
        normalization_rule_name='identity',
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,       # indentation
        user_defined_symbols=SYMBOLS,
        unk_id=0,
        eos_id=1,
        eos_piece=base.END_OF_TEXT,
        bos_id=-1,
        pad_id=-1,
        num_threads=1,                           # sums in one order: the same pieces on every machine
        minloglevel=FATAL,
    )
  except RuntimeError as error:
    raise _refusal(config, vocab_size, str(error)) from error
  return written.getvalue()


def _refusal(config: base.TokenizerConfig, vocab_size: int, message: str) -> errors.UserError:
  """The library's refusal to train, in the user's terms."""
  if found := re.search(r'too high .*<= (\d+)', message):
    return errors.UserError(f'tokenizer.vocab_size={vocab_size} is above the {found[1]} that the training text gives')
  if found := re.search(r'smaller than required_chars\. \d+ vs (\d+)', message):
    return errors.UserError(
        f'tokenizer.vocab_size={vocab_size} is below {found[1]}:'
        f' 256 bytes, {len(SYMBOLS) + 2} symbols and the characters of the training text take that many'
    )
  return errors.UserError(f"tokenizer.model_type={config.model_type}, vocab_size={vocab_size}: can't learn pieces: {_reason(message)}")


def _reason(error: object) -> str:
  """A library's message on one line."""
  return ' '.join(str(error).split())[:200]
