"""Text to ids, in jobs that worker processes share.

A worker is a Python that calls `serve`: it reads a tokenizer and then jobs from its stdin, and writes results to its stdout: a line
of JSON each, with the texts' or the ids' bytes behind it.
(multiprocessing would import the caller's main module in every worker: JAX and all, and a script without a guard would start itself.)
"""

import collections
import concurrent.futures
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from textgen_jax import errors
from textgen_jax.data import documents
from textgen_jax.text import base, build

JOB_CHARACTERS = 1 << 20


class Piece(NamedTuple):
  """Some of a document; encoded apart, pieces give the document's ids."""

  text: str
  is_reply: bool
  document: str
  offset: int  # characters of the document before it; 0: it begins the document


class Encoded(NamedTuple):
  """A piece's ids and measures."""

  ids: np.ndarray
  bytes: int
  words: int
  in_word: tuple[bool, bool]  # whether it begins, and ends, within or beside a word
  unknowns: int
  unknown_bytes: int


def pieces(read: Iterable[documents.Document], cut: Callable[[str], int]) -> Iterator[Piece]:
  """Documents in pieces of about JOB_CHARACTERS, cut where the tokenizer allows."""
  for document in read:
    held, is_reply, offset = '', True, 0
    for part in document.parts:
      if held and part.is_reply != is_reply:
        yield Piece(held, is_reply, document.name, offset)
        held, offset = '', offset + len(held)
      is_reply = part.is_reply
      held += part.text
      while len(held) > JOB_CHARACTERS and (place := _first_cut(held, cut)):
        yield Piece(held[:place], is_reply, document.name, offset)
        held, offset = held[place:], offset + place
    if held:
      yield Piece(held, is_reply, document.name, offset)


def _first_cut(text: str, cut: Callable[[str], int]) -> int:
  """Where a part of about JOB_CHARACTERS ends, or one as short as the text allows; 0: nowhere."""
  size = JOB_CHARACTERS
  while not (place := cut(text[:size])) and size < len(text):
    size *= 2
  return place


def jobs(all_pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
  """Pieces in lists of about JOB_CHARACTERS."""
  job: list[Piece] = []
  size = 0
  for piece in all_pieces:
    job.append(piece)
    size += len(piece.text)
    if size >= JOB_CHARACTERS:
      yield job
      job, size = [], 0
  if job:
    yield job


def encode(tokenizer: base.Tokenizer, piece: Piece) -> Encoded:
  """Raises UserError, naming the document, for text that has no ids."""
  text = piece.text
  try:
    ids = tokenizer.encode(text)
    unknown = tokenizer.special_ids.get('unknown')
    spelled = tokenizer.unknowns(text) if unknown is not None and (ids == unknown).any() else []
  except errors.UserError as error:
    place = f' (counted from its character {piece.offset:,})' if piece.offset else ''
    raise errors.UserError(f'document {piece.document}: {error}{place}') from error
  if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
    raise errors.UserError(f'document {piece.document}: token id {ids.max()} is not in the vocabulary [0, {tokenizer.vocab_size})')
  dtype = id_type(tokenizer.vocab_size)
  spelled_bytes = sum(len(one.encode('utf-8', 'surrogatepass')) for one in spelled)
  in_word = (not text[0].isspace(), not text[-1].isspace())
  return Encoded(ids.astype(dtype), len(text.encode('utf-8', 'surrogatepass')), len(text.split()), in_word, len(spelled), spelled_bytes)


def id_type(vocab_size: int) -> np.dtype:
  """The type of ids on disk."""
  return np.dtype('<u2' if vocab_size <= 1 << 16 else '<u4')


def encode_all(tokenizer: base.Tokenizer, all_jobs: Iterable[list[Piece]], workers: int) -> Iterator[tuple[list[Piece], list[Encoded]]]:
  """Jobs and their results, in order; encoded here where `workers` is 0.

  Raises:
    UserError: text has no ids.
    MachineFailed: a worker died.
  """
  if not workers:
    for job in all_jobs:
      yield job, [encode(tokenizer, piece) for piece in job]
    return
  idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

  def run(job: list[Piece]) -> list[Encoded]:
    worker = idle.get()
    try:
      return worker.run(job)
    finally:
      idle.put(worker)

  running: collections.deque[tuple[list[Piece], concurrent.futures.Future]] = collections.deque()
  with contextlib.ExitStack() as stack:
    for _ in range(workers):
      idle.put(stack.enter_context(contextlib.closing(_Worker(tokenizer))))
    pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(workers))
    stack.callback(pool.shutdown, cancel_futures=True)
    for job in all_jobs:
      running.append((job, pool.submit(run, job)))
      if len(running) > 2 * workers:  # enough to keep them busy; more would only fill the memory
        done, result = running.popleft()
        yield done, result.result()
    for done, result in running:
      yield done, result.result()


class WorkerDied(errors.MachineFailed):
  """Its text isn't to blame."""


class _Worker:
  """A process that encodes."""

  def __init__(self, tokenizer: base.Tokenizer):
    # -P: what lies in the caller's folder shadows no module.
    command = [sys.executable, '-P', '-c', 'from textgen_jax.data import encode; encode.serve()']
    self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment())
    self._tokenizer, self._began = tokenizer, False  # it is sent before the first job

  def run(self, job: list[Piece]) -> list[Encoded]:
    assert self._process.stdin is not None
    assert self._process.stdout is not None
    try:
      if not self._began:
        _send(self._process.stdin, self._tokenizer.fields())
        self._began = True
      _send_job(self._process.stdin, job)
      return _receive_result(self._process.stdout, id_type(self._tokenizer.vocab_size))
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
      try:
        code = self._process.wait(timeout=1)
      except subprocess.TimeoutExpired:
        raise errors.MachineFailed(f'a process that encodes text answered what is no result: {error}') from error
      raise WorkerDied(f'a process that encodes text died with code {code}; the same command goes on') from error

  def close(self) -> None:
    self._process.kill()
    assert self._process.stdin is not None
    assert self._process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # half a job that it never read
      self._process.stdin.close()
    self._process.stdout.close()
    self._process.wait()


def _environment() -> dict[str, str]:
  """Where this process finds its modules, the workers do."""
  return {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, sys.path))}


def _send(stream: IO[bytes], value: Any, parts: Sequence[bytes] = ()) -> None:
  stream.write(json.dumps([value, [len(part) for part in parts]]).encode() + b'\n')
  stream.write(b''.join(parts))
  stream.flush()


def _receive(stream: IO[bytes]) -> tuple[Any, list[bytes]]:
  line = stream.readline()
  if not line.endswith(b'\n'):
    raise EOFError
  value, sizes = json.loads(line)
  parts = [stream.read(size) for size in sizes]
  if [len(part) for part in parts] != sizes:
    raise EOFError
  return value, parts


def _send_job(stream: IO[bytes], job: list[Piece]) -> None:
  # A text may hold half a surrogate pair, which is told where it is encoded.
  _send(stream, [piece[1:] for piece in job], [piece.text.encode('utf-8', 'surrogatepass') for piece in job])


def _receive_job(stream: IO[bytes]) -> list[Piece]:
  rest, texts = _receive(stream)
  return [Piece(text.decode('utf-8', 'surrogatepass'), *one) for text, one in zip(texts, rest, strict=True)]


def _send_result(stream: IO[bytes], encoded: list[Encoded]) -> None:
  _send(stream, [one[1:] for one in encoded], [one.ids.tobytes() for one in encoded])


def _receive_result(stream: IO[bytes], dtype: np.dtype) -> list[Encoded]:
  measures, parts = _receive(stream)
  if isinstance(measures, str):
    raise errors.UserError(measures)
  found = []
  for ids, (num_bytes, words, in_word, unknowns, unknown_bytes) in zip(parts, measures, strict=True):
    found.append(Encoded(np.frombuffer(ids, dtype), num_bytes, words, tuple(in_word), unknowns, unknown_bytes))
  return found


def serve() -> None:
  """A worker's life."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends this one
  receive, send = sys.stdin.buffer, sys.stdout.buffer
  # Where the parent has ended, so does this, without a word.
  with contextlib.suppress(EOFError, OSError):
    tokenizer = build.from_fields(_receive(receive)[0], 'tokenizer')
    while True:
      job = _receive_job(receive)
      try:
        encoded = [encode(tokenizer, piece) for piece in job]
      except errors.UserError as error:
        _send(send, str(error))
      else:
        _send_result(send, encoded)
  os._exit(0)  # what is left in the buffer has no reader
