"""JSON lines on disk: a file that grows by batches and outlives a kill, until all of it is written at once."""

import contextlib
import fcntl
import json
import math
import os
import pathlib
import secrets
import stat
from collections.abc import Iterable
from typing import Any

from textgen_jax import errors

MAX_HEADER_BYTES = 1 << 16


def line(value: Any) -> str:
  """One line of strict JSON; a number that isn't finite becomes null."""
  try:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain) + '\n'
  except ValueError:
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=_plain) + '\n'


def _plain(value: Any) -> Any:
  """numpy's numbers as Python's."""
  return _finite(value.item())


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _finite(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def check_new(field: str, path: str | os.PathLike) -> None:
  """Raises UserError, which begins with `field` and the path, where no new file can come to be."""
  name, where = f'{field}={str(path)!r}', pathlib.Path(path)
  if not where.absolute().parent.is_dir():
    raise errors.UserError(f'{name}: its directory does not exist')
  if where.is_dir() or str(path).endswith('/'):
    raise errors.UserError(f'{name} is a directory')
  if os.path.lexists(where):
    raise errors.UserError(f'{name} exists: name a new file')
  if not os.access(where.absolute().parent, os.W_OK):
    raise errors.UserError(f"{name}: its directory can't be written to")


def write_new(field: str, path: str | os.PathLike, lines: Iterable[str]) -> None:
  """Writes a file as a whole: a reader never sees half of it.

  Raises:
    UserError: a file stands there, which came since `check_new`; it stays as it is.
    MachineFailed: names the field, the path and what the disk said.
  """
  # In the same directory, which makes it the same disk; a name of its own, which no other file or process has.
  temporary = pathlib.Path(path).parent / f'.textgen_jax.{secrets.token_hex(8)}.tmp'
  try:
    with temporary.open('xb') as file:
      file.writelines(one.encode('utf-8', 'replace') for one in lines)
      file.flush()
      os.fsync(file.fileno())
    _move_new(temporary, field, path)
  except OSError as error:
    raise errors.MachineFailed(f'{field}={str(path)!r} could not be written: {error.strerror}') from error
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink()


def _move_new(temporary: pathlib.Path, field: str, path: str | os.PathLike) -> None:
  """Gives a file its name, unless another has it."""
  try:
    os.link(temporary, path)
  except OSError:  # the name is taken, or the file system has no links
    check_new(field, path)
    os.replace(temporary, path)


class Journal:
  """The finished batches of `output`, in `output` + '.partial': a header, then a line a batch.

  A context manager, whose end lets go of the file and takes it away where no batch is in it.

  Args:
    output: the file that is to be.
    request: all that decides its content, as JSON; the header tells it.

  Attributes:
    path: of the journal.
    batches: what an earlier process left there. A last line that is cut short is dropped.

  Raises:
    UserError: there is a journal of another request, a damaged one, or one that another process writes.
  """

  def __init__(self, output: str | os.PathLike, request: dict[str, Any]):
    self._output, self._request = output, request
    self.path = f'{os.fspath(output)}.partial'
    self.batches: list[Any] = []
    self._file = self._open()
    fresh = os.fstat(self._file.fileno()).st_size == 0
    try:
      check_new('output', output)  # another process may have ended since the caller looked
      self._read()
    except BaseException:  # Ctrl-C too: an empty journal would stay
      if fresh:
        self._remove()
      self._file.close()
      raise
    self._written = len(self.batches)

  def _open(self) -> Any:
    """The file at `path`, locked. A process that ends takes its file away, and a lock on that would keep nobody out."""
    for _ in range(100):
      file = self._open_regular()
      self._lock(file)
      if self._is_at_path(file):
        return file
      file.close()
    raise errors.UserError(f'{self.path}: other processes take it away again and again; name another output')

  def _open_regular(self) -> Any:
    try:
      # A pipe would wait for a reader, were it not for O_NONBLOCK.
      file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666), 'r+b')
    except OSError as error:
      raise errors.UserError(f"output={str(self._output)!r}: {self.path} can't be written: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
      file.close()
      raise errors.UserError(f'{self.path} is not a regular file: delete it, or name another output')
    return file

  def _lock(self, file: Any) -> None:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.close()
      raise errors.UserError(f'{self.path}: another process writes it; name another output, or wait') from error
    except (OSError, NotImplementedError):  # a file system without locks
      pass

  def _is_at_path(self, file: Any) -> bool:
    try:
      return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
    except OSError:
      return False

  def _remove(self) -> None:
    """Takes the journal away, while it is locked: what stands there after that is another process's."""
    if self._is_at_path(self._file):
      with contextlib.suppress(OSError):
        os.unlink(self.path)

  def _read(self) -> None:
    header = line({'journal': 1, **self._request}).encode()
    first = self._file.readline(MAX_HEADER_BYTES)
    if first != header:
      if not (header.startswith(first) and not self._file.read(1)):  # nothing, or a header that was cut short
        raise errors.UserError(f'{self.path} is a journal of {self._other(first)}: delete it, or name another output')
      self._file.seek(0)
      self._write(header)
    end = self._file.tell()
    while one := self._file.readline():
      batch = self._batch(one)
      if batch is None:
        if self._file.read(1):
          raise errors.UserError(f'{self.path}, line {len(self.batches) + 2} is damaged: delete it, or name another output')
        break
      self.batches.append(batch)
      end += len(one)
    self._file.seek(end)
    self._file.truncate()

  def _other(self, first: bytes) -> str:
    """What the header of another request is of."""
    try:
      told = json.loads(first)
      differing = [name for name, value in self._request.items() if told[name] != value]
    except (ValueError, KeyError, TypeError, RecursionError):
      return 'something else'
    return f'other {", ".join(differing)}' if differing else 'something else'

  def _batch(self, one: bytes) -> Any:
    """The rows of a line, None where it isn't whole or isn't the next batch."""
    try:
      content = json.loads(one)
      whole = one.endswith(b'\n') and content['batch'] == len(self.batches) and isinstance(content['rows'], list)
      return content['rows'] if whole else None
    except (ValueError, KeyError, TypeError, RecursionError):
      return None

  def append(self, rows: list[Any]) -> None:
    """Adds a finished batch; it is on the disk when this returns."""
    self._write(line({'batch': self._written, 'rows': rows}).encode('utf-8', 'replace'))
    self._written += 1

  def _write(self, data: bytes) -> None:
    try:
      self._file.write(data)
      self._file.flush()
      os.fsync(self._file.fileno())
    except OSError as error:
      raise errors.MachineFailed(f'{self.path} could not be written: {error.strerror}') from error

  def finish(self, lines: Iterable[str]) -> None:
    """Writes the output and takes the journal away."""
    write_new('output', self._output, lines)
    self._remove()
    self._written = 0

  def __enter__(self) -> 'Journal':
    return self

  def __exit__(self, *_: object) -> None:
    if not self._written:
      self._remove()
    with contextlib.suppress(OSError):  # what couldn't be written was told already
      self._file.close()
