"""Text to tokens on disk: once for each corpus and tokenizer, then only opened."""

import dataclasses
import hashlib
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import tqdm

from textgen_jax import errors
from textgen_jax.data import corpora, downloads
from textgen_jax.text import base, build

FORMAT = 1  # counts changes to the files below or to how documents are joined


@dataclasses.dataclass(frozen=True)
class PreparedData:
  """Tokens of each split, and what made them.

  `description` holds `format`, `corpus` (its name), `corpus_key`, `tokenizer` (its fingerprint) and `splits`: for each one its
  `tokens`, `bytes` (UTF-8, that the tokens stand for), `documents`, `sha256` (of the file) and `dtype`.
  """

  tokenizer: base.Tokenizer
  splits: dict[str, np.memmap]  # [N] each, of the smallest unsigned type that holds the vocabulary
  description: dict[str, Any]
  fingerprint: str              # SHA-256 (hex) of the tokenizer and of every split's tokens
  directory: pathlib.Path


def prepare(data: corpora.DataConfig, tokenizer: base.TokenizerConfig) -> PreparedData:
  """Trains the tokenizer on the training split and tokenises every split, or opens what an earlier call left in the cache.

  In a split, documents follow each other in order, each after the first preceded by the token `document_start`.

  Raises:
    UserError: wrong configuration, text that can't be read, or a character that the tokenizer doesn't know.
    MachineFailed: a download or a write failed.
  """
  build.check(tokenizer)
  corpus = corpora.open_corpus(data)
  determined_by = [FORMAT, corpus.key, dataclasses.asdict(tokenizer)]
  key = hashlib.sha256(json.dumps(determined_by, sort_keys=True).encode()).hexdigest()[:32]
  directory = downloads.cache_directory() / 'prepared' / key
  with downloads.locked(directory.with_suffix('.lock')):
    prepared = _open(directory, corpus.name)
    if prepared is None:
      try:
        _write(directory, corpus, tokenizer)
      except OSError as error:
        raise errors.MachineFailed(f"can't write {directory}: {error.strerror}; TEXTGEN_JAX_CACHE sets another place") from error
      prepared = _open(directory, corpus.name)
  if prepared is None:
    raise errors.MachineFailed(f"{directory} was written and can't be read back: check the disk")
  return prepared


def _open(directory: pathlib.Path, corpus_name: str) -> PreparedData | None:
  """What is prepared in `directory`; None where it is missing or damaged (a file's size isn't the described one)."""
  try:
    description = json.loads((directory / 'description.json').read_bytes())
    tokenizer = build.load(directory / 'tokenizer')
    splits = {}
    for split, about in description['splits'].items():
      splits[split] = np.memmap(directory / f'{split}.bin', about['dtype'], 'r')
      if len(splits[split]) != about['tokens']:
        return None
    if tokenizer.fingerprint() != description['tokenizer']:
      return None
  except (OSError, ValueError, KeyError, TypeError, AttributeError, errors.UserError):
    return None
  # Two paths may hold the same text: the name is the caller's.
  description['corpus'] = corpus_name
  return PreparedData(tokenizer, splits, description, _fingerprint(description), directory)


def _write(directory: pathlib.Path, corpus: corpora.Corpus, config: base.TokenizerConfig) -> None:
  splits = corpus.documents()
  tokenizer = build.train(config, [document.text for document in splits['train']])
  partial = directory.with_suffix('.partial')  # the lock is ours: what stands there is a dead process's
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir()
  try:
    tokenizer.save(partial / 'tokenizer')
    characters = sum(len(document.text) for documents in splits.values() for document in documents)
    with tqdm.tqdm(total=characters, unit='char', unit_scale=True, desc='tokenise', disable=None) as bar:
      about = {split: _write_split(partial, split, documents, tokenizer, bar) for split, documents in splits.items() if documents}
    description = {
        'format': FORMAT,
        'corpus': corpus.name,
        'corpus_key': corpus.key,
        'tokenizer': tokenizer.fingerprint(),
        'splits': about,
    }
    (partial / 'description.json').write_text(json.dumps(description, indent=2) + '\n')
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _write_split(
    directory: pathlib.Path, split: str, documents: list[corpora.Document], tokenizer: base.Tokenizer, bar: tqdm.tqdm
) -> dict[str, Any]:
  dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
  byte_lengths = tokenizer.byte_lengths()
  start = np.array([tokenizer.special_ids['document_start']], np.int32)
  digest, tokens, size = hashlib.sha256(), 0, 0
  with open(directory / f'{split}.bin', 'wb') as file:
    for index, document in enumerate(documents):
      try:
        ids = tokenizer.encode(document.text)
      except errors.UserError as error:
        raise errors.UserError(f'split {split}, document {document.name}: {error}') from error
      if index:
        ids = np.concatenate([start, ids])
      data = ids.astype(dtype).tobytes()
      file.write(data)
      digest.update(data)
      tokens += len(ids)
      size += int(byte_lengths[ids].sum(dtype=np.int64))
      bar.update(len(document.text))
  return {'tokens': tokens, 'bytes': size, 'documents': len(documents), 'sha256': digest.hexdigest(), 'dtype': dtype.name}


def _fingerprint(description: dict[str, Any]) -> str:
  streams = {split: about['sha256'] for split, about in description['splits'].items()}
  return hashlib.sha256(json.dumps([FORMAT, description['tokenizer'], streams], sort_keys=True).encode()).hexdigest()
