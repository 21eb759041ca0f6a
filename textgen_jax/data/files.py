"""Own text: files of any size, read in blocks. .gz and .zst are unpacked; each line of a .jsonl is a document, else each file."""

import array
import codecs
import contextlib
import glob
import gzip
import hashlib
import io
import json
import os
import stat
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import tqdm
import zstandard

from textgen_jax import errors
from textgen_jax.data import documents
from textgen_jax.text import base

BLOCK_BYTES = 1 << 20
PACKED_BYTES = 1 << 10  # of a .zst, unpacked at a time: 32,768 times as much where a byte is repeated
MAX_LINE_BYTES = 1 << 26  # of a .jsonl, which is read whole and may take twenty times the memory
FORMAT = 1  # counts changes to what files read as


def open_files(path: str, field: str, val_fraction: float) -> documents.Corpus:
  """The corpus that `data.path` names, its last part held out; reads everything once, to check, measure and hash it.

  Args:
    path: a file, several after commas, a glob, or a directory.
    field: what holds the text of a .jsonl line.
    val_fraction: of the characters; 1: all of it is val.

  Raises:
    UserError: a file that can't be read or isn't text, with the place in it.
  """
  names = _find_files(path)
  # Documents are named from here on: text that is moved as a whole keeps its names, and so its key.
  root = os.path.commonpath([os.path.dirname(os.path.abspath(name)) for name in names])
  stamps = [_stamp(name) for name in names]
  digest, sizes, counts = hashlib.sha256(), array.array('q'), []  # characters of each document; documents of each file
  with tqdm.tqdm(total=sum(stamp[0] for stamp in stamps), unit='B', unit_scale=True, desc='read', disable=None, delay=2) as bar:
    for name, stamp in zip(names, stamps, strict=True):
      before = len(sizes)
      digest.update(os.path.relpath(name, root).encode('utf-8', 'surrogateescape'))
      for _, blocks in _unchanged(name, field, stamp):
        content, characters = hashlib.sha256(), 0
        for block in blocks:
          content.update(block.encode())
          characters += len(block)
        digest.update(content.digest())
        sizes.append(characters)
      counts.append(len(sizes) - before)
      bar.update(stamp[0])
  if sum(sizes) < 2 and val_fraction < 1:
    raise errors.UserError(f'data.path={path} holds less than 2 characters: nothing to train on')
  first_val, cut = _first_held_out(sizes, val_fraction), cut_place(sizes[0], val_fraction)

  def read(split: str) -> Iterator[documents.Document]:
    wanted = range(first_val) if split == 'train' else range(first_val, len(sizes))
    index = 0  # of the file's first document
    for name, stamp, count in zip(names, stamps, counts, strict=True):
      if index < wanted.stop and wanted.start < index + count:
        for i, (document, blocks) in enumerate(_unchanged(name, field, stamp), start=index):
          if i in wanted:
            yield documents.Document(os.path.relpath(document, root), map(documents.Part, blocks))
      index += count

  def read_cut(split: str) -> Iterator[documents.Document]:
    low, high = (0, cut) if split == 'train' else (cut, sizes[0])
    for document, blocks in _unchanged(names[0], field, stamps[0]):
      yield documents.Document(os.path.relpath(document, root), _part(blocks, low, high))

  splits: tuple[str, ...] = ('train', 'val')
  if val_fraction == 1:
    splits, first_val = ('val',), 0
  key = f'files:{digest.hexdigest()}:{val_fraction!r}:{FORMAT}'
  return documents.Corpus(path, key, splits, read_cut if len(sizes) == 1 and val_fraction < 1 else read, sum(sizes))


def _first_held_out(sizes: array.array, val_fraction: float) -> int:
  """The first of the fewest last documents that reach the fraction, and never all."""
  wanted = val_fraction * sum(sizes)
  first = len(sizes)
  while wanted > 1e-6 and first > 1:  # 0.55 of 100 is more than 55
    first -= 1
    wanted -= sizes[first]
  return first


def cut_place(characters: int, val_fraction: float) -> int:
  """Where the last `val_fraction` of a text begins."""
  place = int((1 - val_fraction) * characters + 1e-6)  # 0.8 of 10 is 2, though 1 - 0.8 is less than 0.2
  return min(max(place, 1), characters - 1)


def _part(blocks: Iterator[str], low: int, high: int) -> Iterator[documents.Part]:
  """Characters low ... high - 1 of a text that comes in blocks."""
  at = 0
  for block in blocks:
    piece = block[max(low - at, 0) : max(high - at, 0)]
    if piece:
      yield documents.Part(piece)
    at += len(block)


def _stamp(path: str) -> tuple[int, int, int]:
  with _reading(path):
    found = os.stat(path)
  return found.st_size, found.st_mtime_ns, found.st_ino


def _unchanged(path: str, field: str, stamp: tuple[int, int, int]) -> Iterator[tuple[str, Iterator[str]]]:
  """`_documents`; raises UserError where the file isn't the one that had `stamp`."""
  for found in (_documents(path, field), iter(())):
    if _stamp(path) != stamp:
      raise errors.UserError(f'data.path: {path} changed while it was read')
    yield from found


def _documents(path: str, field: str) -> Iterator[tuple[str, Iterator[str]]]:
  """Names and texts of a file's documents; a text comes in blocks, none of them empty."""
  with _reading(path), _open(path) as file:
    if not path.lower().removesuffix('.gz').removesuffix('.zst').endswith('.jsonl'):
      yield path, _text(path, file)
      return
    number = 0
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b''), start=1):
      yield f'{path}:{number}', iter([_field(f'{path}, line {number}', line, field)])
    if not number:
      raise errors.UserError(f'data.path: {path} is empty')


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
  """Tells which file it is that can't be read."""
  try:
    yield
  except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
    raise errors.UserError(f'data.path: {path} is damaged: {error}') from error
  except OSError as error:
    raise errors.UserError(f"data.path: can't read {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
  if not stat.S_ISREG(os.stat(path).st_mode):
    raise errors.UserError(f'data.path: {path} is not a regular file')
  if path.lower().endswith('.gz'):
    with gzip.open(path) as file:
      yield file  # type: ignore[misc]
  elif path.lower().endswith('.zst'):
    with open(path, 'rb') as packed, io.BufferedReader(_Unpacked(packed), BLOCK_BYTES) as file:
      yield file
  else:
    with open(path, 'rb') as file:
      yield file


class _Unpacked(io.RawIOBase):
  """The text of a .zst. The library's own stream takes a file that was cut for one that ended."""

  def __init__(self, packed: BinaryIO):
    self._packed, self._waiting = packed, b''
    self._frame: zstandard.ZstdDecompressionObj | None = None

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    while not self._waiting:
      frame = self._frame if self._frame is not None and not self._frame.eof else None
      rest = self._frame.unused_data if self._frame is not None and frame is None else b''
      data = rest or self._packed.read(PACKED_BYTES)
      if not data and frame is not None:
        raise EOFError('it ends within a frame')
      if not data:
        return 0
      # Several frames follow each other where files were joined, or packed in parallel.
      self._frame = frame or zstandard.ZstdDecompressor().decompressobj()
      self._waiting = self._frame.decompress(data)
    size = min(len(buffer), len(self._waiting))
    buffer[:size], self._waiting = self._waiting[:size], self._waiting[size:]
    return size


def _text(path: str, file: BinaryIO) -> Iterator[str]:
  decoder = codecs.getincrementaldecoder('utf-8')()
  read, shown = 0, 0  # bytes and characters before the block
  while True:
    with _reading(path):
      data = file.read(BLOCK_BYTES)
    if not read:
      if not data:
        raise errors.UserError(f'data.path: {path} is empty')
      if data.startswith(codecs.BOM_UTF8):
        raise errors.UserError(f'data.path: {path} begins with a byte-order mark (EF BB BF): save it as UTF-8 without one')
    pending = len(decoder.getstate()[0])
    try:
      text = decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:
      wrong = error.object[error.start]
      raise errors.UserError(f"data.path: {path} isn't UTF-8 text: byte 0x{wrong:02x} at offset {read - pending + error.start}") from error
    if text:
      _check_text(path, text, shown)
      yield text
    if not data:
      return
    read, shown = read + len(data), shown + len(text)


def _field(where: str, line: bytes, field: str) -> str:
  """The text of a .jsonl line."""
  if len(line) >= MAX_LINE_BYTES:
    raise errors.UserError(f'data.path: {where} is longer than {MAX_LINE_BYTES} bytes')
  try:
    row = json.loads(line.decode())  # of bytes it would take UTF-16 and a byte-order mark
  except (ValueError, RecursionError) as error:
    raise errors.UserError(f"data.path: {where} isn't JSON: {error}") from error
  text = row.get(field) if isinstance(row, dict) else None
  if not isinstance(text, str):
    raise errors.UserError(f'data.path: {where} has no text in the field data.field={field}')
  if not text:
    raise errors.UserError(f'data.path: {where} is an empty document')
  _check_text(where, text, 0)
  at = base.first_surrogate(text)  # JSON can spell what UTF-8 can't
  if at >= 0:
    raise errors.UserError(f'data.path: {where} holds {text[at]!r} at character {at}: half a surrogate pair, not text')
  return text


def _check_text(where: str, text: str, offset: int) -> None:
  """Raises UserError for what no text holds."""
  for wrong, name in (('\0', 'NUL'), ('\ufeff', 'a byte-order mark')):
    at = text.find(wrong)
    if at >= 0:
      raise errors.UserError(f'data.path: {where} holds {name}, {wrong!r}, at character {offset + at}, which is not text')


def exists(path: str) -> bool:
  """Whether `data.path` could be this."""
  return any(os.path.exists(os.path.expanduser(part)) or glob.has_magic(part) for part in (path, *path.split(',')))


def _find_files(path: str) -> list[str]:
  """Files that data.path names, sorted, each once. What exists as written is taken so, even with a comma or a star in its name."""
  parts = [path] if os.path.exists(os.path.expanduser(path)) else [part.strip() for part in path.split(',')]
  found: dict[str, str] = {}  # by the real path: one text in train and in val would make val worthless
  for part in filter(None, parts):
    part = os.path.expanduser(part)
    names = [part] if os.path.exists(part) else glob.glob(part, recursive=True)
    if not names:
      raise errors.UserError(f"data.path={path}: {part} doesn't exist" + (' and matches nothing' if glob.has_magic(part) else ''))
    for name in sorted(names, key=len):
      for file in _walk(name) if os.path.isdir(name) else [name]:
        found.setdefault(os.path.realpath(file), file)
  if not found:
    raise errors.UserError(f'data.path={path} holds no files')
  return sorted(found.values())


def _walk(directory: str) -> list[str]:
  """Files below `directory`; hidden files and folders are skipped."""
  found = []
  for folder, folders, names in os.walk(directory):
    folders[:] = [name for name in folders if not name.startswith('.')]
    found += [os.path.join(folder, name) for name in names if not name.startswith('.')]
  return found
