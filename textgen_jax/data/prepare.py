"""Text to tokens on disk: once for each text and tokenizer, in bounded memory, going on where it was stopped; then only opened."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tqdm

from textgen_jax import errors
from textgen_jax.data import corpora, documents, downloads, encode, tokens
from textgen_jax.text import base, build

FORMAT = 2  # counts changes to the files below or to how documents are joined
JOURNAL = 'journal.json'
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, errors.UserError)  # what reading such a file raises
JOURNAL_JOBS = 16  # jobs between two notes of how far it has come: what is done again after a kill
PARALLEL_CHARACTERS = 1 << 24  # less is encoded before a worker has started


@dataclasses.dataclass(frozen=True)
class PreparedData:
  """Tokens of each split, and what made them.

  `description` holds `format`, `corpus` (its name), `tokenizer` (its fingerprint) and `splits`: for each one its
  `tokens`, `dtype`, `documents` (how many), `ranges` (of each corpus: start, stop, weight) and `sha256` of its files by suffix.
  """

  tokenizer: base.Tokenizer
  splits: dict[str, tokens.Split]
  description: dict[str, Any]
  fingerprint: str  # SHA-256 (hex) of the tokenizer and of every split's tokens
  directory: pathlib.Path

  def names(self, split: str) -> list[str]:
    """The documents' names, in order."""
    with open(self.directory / f'{split}.names', encoding='utf-8') as file:
      return [json.loads(line) for line in file]


def prepare(data: corpora.DataConfig, tokenizer: base.TokenizerConfig) -> PreparedData:
  """Trains the tokenizer on the training split and tokenises every split, or opens what an earlier call left in the cache.

  In a split each document follows the token `end_of_text`, and one more ends the last.

  Raises:
    UserError: wrong configuration, text that can't be read, or a character that the tokenizer doesn't know.
    MachineFailed: a download or a write failed.
  """
  build.check(tokenizer)
  opened = corpora.open_corpora(data)
  name = data.mixture or opened[0][0].name
  determined_by = [FORMAT, [[corpus.key, weight] for corpus, weight in opened], data.loss_on_replies, _tokenizer_key(tokenizer)]
  key = hashlib.sha256(json.dumps(determined_by, sort_keys=True).encode()).hexdigest()[:32]
  directory = downloads.cache_directory() / 'prepared' / key
  with downloads.locked(directory.with_suffix('.lock')):
    prepared = _open(directory, name)
    if prepared is None:
      partial = directory.with_suffix('.partial')  # the lock is ours: what stands there is a dead process's
      with _whole_or_nothing(partial):
        train = functools.partial(build.train, tokenizer, _training_texts([corpus for corpus, _ in opened]))
        _write(partial, opened, data.loss_on_replies, train, {'format': FORMAT, 'corpus': name, 'determined_by': determined_by})
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
        (directory / JOURNAL).unlink()
      prepared = _open(directory, name)
  return _read_back(prepared, directory)


def _is_alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return True


def _read_back(prepared: PreparedData | None, directory: pathlib.Path) -> PreparedData:
  if prepared is None:
    raise errors.MachineFailed(f"{directory} was written and can't be read back: check the disk")
  return prepared


@contextlib.contextmanager
def tokenized(corpus: documents.Corpus, tokenizer: base.Tokenizer) -> Iterator[PreparedData]:
  """A corpus in a tokenizer's ids, on disk until the context ends."""
  cache = downloads.cache_directory()
  with downloads.locked(cache / 'tokenized.lock'):
    for left in cache.glob('tokenized_*_*'):  # by a process that was killed
      if not _is_alive(int(left.name.split('_')[1])):
        shutil.rmtree(left, ignore_errors=True)
  with tempfile.TemporaryDirectory(dir=cache, prefix=f'tokenized_{os.getpid()}_') as folder:
    directory = pathlib.Path(folder, 'tokens')
    with _whole_or_nothing(directory):
      _write(directory, [(corpus, 1.0)], False, lambda: tokenizer, {'format': FORMAT, 'corpus': corpus.name})
    prepared = _open(directory, corpus.name)
    yield _read_back(prepared, directory)


@contextlib.contextmanager
def _whole_or_nothing(directory: pathlib.Path) -> Iterator[None]:
  """Leaves nothing behind where an error ends it; what a signal ends can be gone on with, in this process or another."""
  try:
    yield
  except OSError as error:
    shutil.rmtree(directory, ignore_errors=True)
    raise errors.MachineFailed(f"can't write {directory}: {error.strerror}; TEXTGEN_JAX_CACHE sets another place") from error
  except encode.WorkerDied:  # as when memory was short: it can be gone on with
    raise
  except Exception:  # whatever it is: what is half written is of no use
    shutil.rmtree(directory, ignore_errors=True)
    raise


def _tokenizer_key(config: base.TokenizerConfig) -> dict[str, Any]:
  fields = dataclasses.asdict(config)
  if config.model_path:  # what it holds decides, not where it lies
    content = base.read_bounded(config.model_path, base.MAX_FILE_BYTES, 'tokenizer.model_path')
    fields['model_path'] = hashlib.sha256(content).hexdigest()
  return fields


def _training_texts(opened: list[documents.Corpus]) -> Iterator[str]:
  """The training split's text, in parts that end with a line where there are lines."""
  for corpus in opened:
    for piece in encode.pieces(corpus.read('train'), lambda text: text.rfind('\n') + 1):
      yield piece.text


def _open(directory: pathlib.Path, name: str) -> PreparedData | None:
  """What is prepared in `directory`; None where it is missing or damaged."""
  try:
    description = json.loads((directory / 'description.json').read_bytes())
    tokenizer = build.load(directory / 'tokenizer')
    if tokenizer.fingerprint() != description['tokenizer']:
      return None
    dtype = encode.id_type(tokenizer.vocab_size)
    splits = {split: _open_split(directory, split, about, dtype) for split, about in description['splits'].items()}
    hashes = {split: {**about['sha256'], 'ranges': about['ranges']} for split, about in description['splits'].items()}
    for one in hashes.values():
      del one['names']
    if 'val' not in splits:
      return None
  except DAMAGED:
    return None
  # Two paths may hold the same text: the name is the caller's.
  description['corpus'] = name
  fingerprint = hashlib.sha256(json.dumps([FORMAT, description['tokenizer'], hashes], sort_keys=True).encode()).hexdigest()
  return PreparedData(tokenizer, splits, description, fingerprint, directory)


def _open_split(directory: pathlib.Path, split: str, about: dict[str, Any], dtype: np.dtype) -> tokens.Split:
  """Raises one of DAMAGED where a file isn't what was written."""
  if about['dtype'] != dtype.name or not {'bin', 'documents', 'names'} <= set(about['sha256']):
    raise ValueError(f'{split}: dtype or sha256')
  if _sha256_of(about['ranges']) != about['ranges_sha256']:
    raise ValueError(f'{split}: ranges')
  for suffix, sha256 in about['sha256'].items():
    if downloads.file_sha256(directory / f'{split}.{suffix}') != sha256:
      raise ValueError(f'{split}.{suffix}')
  ids = np.memmap(directory / f'{split}.bin', dtype, 'r')
  records = np.fromfile(directory / f'{split}.documents', tokens.DOCUMENT)
  is_reply = np.memmap(directory / f'{split}.replies', np.bool_, 'r') if 'replies' in about['sha256'] else None
  if len(ids) != about['tokens'] or len(records) != about['documents']:
    raise ValueError(f'{split}.bin')
  return tokens.Split(ids, records, tuple(tokens.Range(*one) for one in about['ranges']), is_reply)


def _write(
  directory: pathlib.Path,
  opened: list[tuple[documents.Corpus, float]],
  only_replies: bool,
  get_tokenizer: Callable[[], base.Tokenizer],
  description: dict[str, Any],
) -> None:
  """Everything into `directory`, where a process that was killed may have left its beginning."""
  directory.mkdir(exist_ok=True)
  journal = _Journal(directory)
  if journal.tokenizer is None:
    tokenizer = get_tokenizer()
    tokenizer.save(directory / 'tokenizer')
    journal.tokenizer = tokenizer.fingerprint()
    journal.write()
  else:
    print(f'going on in {directory}', file=sys.stderr)
  tokenizer = build.load(directory / 'tokenizer')
  characters = [corpus.characters for corpus, _ in opened]
  known = sum(filter(None, characters))
  total = None if None in characters else known
  workers = _cores() if known > PARALLEL_CHARACTERS else 0  # a corpus that doesn't know its size fits in memory
  names = [split for split in ('train', 'val', 'test') if any(split in corpus.splits for corpus, _ in opened)]
  with tqdm.tqdm(total=total, unit='char', unit_scale=True, desc='tokenise', disable=None) as bar:
    for split in names:
      parts = [(i, corpus) for i, (corpus, _) in enumerate(opened) if split in corpus.splits]
      with _SplitWriter(directory, split, tokenizer, only_replies, journal) as writer:
        for i, corpus in parts:
          prefix = f'{corpus.name}/' if len(opened) > 1 else ''
          jobs = encode.jobs(encode.pieces(corpus.read(split), tokenizer.cut))
          written = writer.begin_corpus(i)
          if written is None:
            continue
          for job in itertools.islice(jobs, written):
            bar.update(sum(len(piece.text) for piece in job))
          try:
            for job, encoded in encode.encode_all(tokenizer, jobs, workers):
              writer.write(job, encoded, prefix)
              bar.update(sum(len(piece.text) for piece in job))
          except errors.UserError as error:
            raise errors.UserError(f'split {split}, {error}') from error
        writer.end()
  weights = [weight for _, weight in opened]
  description |= {'tokenizer': journal.tokenizer, 'splits': {split: _describe(directory, split, journal, weights) for split in names}}
  (directory / 'description.json').write_text(json.dumps(description, indent=2) + '\n', encoding='utf-8')


def _describe(directory: pathlib.Path, split: str, journal: '_Journal', weights: list[float]) -> dict[str, Any]:
  about = journal.splits[split]
  total = sum(weights[int(i)] for i in about['stops'])
  starts = [0, *(stop - 1 for stop in about['stops'].values())]
  ranges = [[start, stop, weights[int(i)] / total] for start, (i, stop) in zip(starts, about['stops'].items(), strict=False)]
  return {
    'tokens': about['tokens'],
    'dtype': about['dtype'],
    'documents': about['documents'],
    'ranges': ranges,
    'ranges_sha256': _sha256_of(ranges),
    'sha256': {suffix: downloads.file_sha256(directory / f'{split}.{suffix}') for suffix in about['sizes']},
  }


class _Journal:
  """How far a preparation has come, on disk; what lies past it in the files is written anew."""

  def __init__(self, directory: pathlib.Path):
    self.path = directory / JOURNAL
    self.tokenizer: str | None = None  # its fingerprint, once it is saved
    self.splits: dict[str, dict[str, Any]] = {}
    try:
      stored = json.loads(self.path.read_bytes())
      if stored.pop('sha256') != _sha256_of(stored):
        raise ValueError(self.path)
      whole = build.load(directory / 'tokenizer').fingerprint() == stored['tokenizer']
      for split, about in stored['splits'].items():  # a file that lost its end, as after a power cut, would be filled up with zeros
        whole &= all((directory / f'{split}.{suffix}').stat().st_size >= size for suffix, size in about['sizes'].items())
      if whole:
        self.tokenizer, self.splits = stored['tokenizer'], stored['splits']
    except DAMAGED:
      pass  # it begins anew

  def write(self) -> None:
    temporary = self.path.with_suffix('.tmp')
    content = {'tokenizer': self.tokenizer, 'splits': self.splits}
    temporary.write_text(json.dumps({**content, 'sha256': _sha256_of(content)}), encoding='utf-8')
    os.replace(temporary, self.path)


class _SplitWriter:
  """Appends encoded pieces to a split's files.

  Its state is one JSON object, so that a later process can go on: `open` is the record of the document that isn't closed yet.
  """

  def __init__(self, directory: pathlib.Path, split: str, tokenizer: base.Tokenizer, only_replies: bool, journal: _Journal):
    self._end_of_text, self._only_replies, self._journal = tokenizer.special_ids['end_of_text'], only_replies, journal
    self._dtype = encode.id_type(tokenizer.vocab_size)
    suffixes = ['bin', 'documents', 'names'] + ['replies'] * only_replies
    self._state = journal.splits.setdefault(split, {
      'dtype': self._dtype.name, 'tokens': 0, 'documents': 0, 'jobs': 0, 'corpus': -1, 'stops': {}, 'sizes': dict.fromkeys(suffixes, 0),
      'open': None, 'in_word': False, 'is_reply': False, 'done': False,
    })  # fmt: skip
    self._files = {}
    for suffix, size in self._state['sizes'].items():
      file = self._files[suffix] = open(directory / f'{split}.{suffix}', 'ab')  # noqa: SIM115, closed by __exit__
      file.truncate(size)

  def __enter__(self) -> '_SplitWriter':
    return self

  def __exit__(self, *_: Any) -> None:
    for file in self._files.values():
      file.close()

  def begin_corpus(self, index: int) -> int | None:
    """How many of the corpus's jobs are written already; None where all are."""
    state = self._state
    if state['done'] or index < state['corpus']:
      return None
    if index > state['corpus']:
      if state['corpus'] >= 0:
        state['stops'][str(state['corpus'])] = state['tokens'] + 1  # with the `end_of_text` that the next one begins with
      state['corpus'], state['jobs'] = index, 0
    return state['jobs']

  def write(self, job: list[encode.Piece], encoded: list[encode.Encoded], prefix: str) -> None:
    state = self._state
    for piece, one in zip(job, encoded, strict=True):
      if not piece.offset:
        self._begin_document(prefix + piece.document)
      self._append(one.ids, piece.is_reply)
      if piece.is_reply or not self._only_replies:
        record = state['open']
        record['tokens'] += len(one.ids)
        record['bytes'] += one.bytes
        record['characters'] += len(piece.text)
        # A word that a cut goes through is one word.
        record['words'] += one.words - (one.in_word[0] and state['in_word'] and bool(piece.offset))
        record['unknowns'] += one.unknowns
        record['unknown_bytes'] += one.unknown_bytes
      state['in_word'], state['is_reply'] = one.in_word[1], piece.is_reply
    state['jobs'] += 1
    if state['jobs'] % JOURNAL_JOBS == 0:
      self._note()

  def end(self) -> None:
    state = self._state
    if not state['done']:
      self._close_document()
      state['stops'][str(state['corpus'])] = state['tokens']
      state['done'] = True
    self._note()

  def _begin_document(self, name: str) -> None:
    start = self._state['tokens']
    self._close_document()
    self._state['open'] = {'start': start, 'tokens': 0, **dict.fromkeys(tokens.MEASURES, 0)}
    self._files['names'].write((json.dumps(name) + '\n').encode())

  def _close_document(self) -> None:
    """Writes `end_of_text`, which is also what the next document follows, and the record of the one that it closes."""
    state = self._state
    record = state['open']
    counts = record is not None and (state['is_reply'] or not self._only_replies)
    self._append(np.array([self._end_of_text], self._dtype), counts)
    if record is not None:
      record['tokens'] += counts
      self._files['documents'].write(np.array([tuple(record.values())], tokens.DOCUMENT).tobytes())
      state['documents'] += 1

  def _append(self, ids: np.ndarray, is_reply: bool) -> None:
    self._files['bin'].write(ids.tobytes())  # of the type that `encode` gives
    if self._only_replies:
      self._files['replies'].write(np.full(len(ids), is_reply, np.bool_).tobytes())
    self._state['tokens'] += len(ids)

  def _note(self) -> None:
    for suffix, file in self._files.items():
      file.flush()
      os.fsync(file.fileno())
      self._state['sizes'][suffix] = file.tell()
    self._journal.write()


def _sha256_of(value: Any) -> str:
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
