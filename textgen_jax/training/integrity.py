"""A checkpoint's files, counted and hashed, so that no damage goes unnoticed."""

import concurrent.futures
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

MANIFEST = 'manifest.json'
MAX_MANIFEST_BYTES = 1 << 26  # of a checkpoint in 400,000 files
# Orbax may still write these once the manifest is sealed, and reads a checkpoint as well where they are lost or damaged.
UNSEALED = ('_CHECKPOINT_METADATA', 'commit_success.txt')


Measures = dict[str, list[Any]]  # a file's size, SHA-256 and time of change (ns), by its name below the folder


def measured(folder: pathlib.Path, pattern: str = '**/*') -> Measures:
  """The files below `folder` whose names match, but for those that aren't sealed, and those that go while it looks."""

  def measure(name: str) -> list[Any] | None:
    try:
      return [*_measure(folder / name), _changed(folder / name)]
    except FileNotFoundError:
      return None

  names = _names(folder, pattern)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    return {name: found for name, found in zip(names, pool.map(measure, names), strict=True) if found}


def _names(folder: pathlib.Path, pattern: str) -> list[str]:
  names = (path.relative_to(folder).as_posix() for path in folder.glob(pattern) if path.is_file())
  return sorted(name for name in names if name.rpartition('/')[2] not in UNSEALED)


def seal(folder: pathlib.Path, name: str, known: Measures | None = None) -> None:
  """Writes the manifest of all files below `folder`: their sizes and SHA-256, and the name that the folder is about to bear.

  Args:
    folder: with all its files.
    name: what it will be called.
    known: what is measured already; it holds of files that weren't changed since.
  """
  known = known or {}
  names = _names(folder, '**/*')
  new = [name for name in names if name not in known or [(folder / name).stat().st_size, _changed(folder / name)] != known[name][::2]]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    sums = dict(zip(new, pool.map(lambda name: _measure(folder / name), new), strict=True))
  write_sealed(folder / MANIFEST, {'name': name, 'files': {name: sums[name] if name in sums else known[name][:2] for name in names}})


def problem(folder: pathlib.Path, items: Sequence[str], share: tuple[int, int] = (0, 1)) -> str | None:
  """What is wrong with the `items` (subfolders) of a sealed folder, naming the file; None where each bit is as it was sealed.

  A `share` (i, n) is the i-th of n parts of the files, to be read by one of n processes; all sizes are compared in any case.
  """
  if folder.is_symlink():
    return 'it is a link'
  try:
    sealed = read_sealed(folder / MANIFEST)
    wanted = {name: [int(size), str(sha256)] for name, (size, sha256) in sealed['files'].items() if name.partition('/')[0] in items}
    if sealed['name'] != folder.name:
      return f'its {MANIFEST} is that of {sealed["name"]}'
  except FileNotFoundError:
    return f'it has no {MANIFEST}: it was never finished, or is being deleted'
  except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
    return f'{MANIFEST} is damaged ({error})'
  if missing := [item for item in items if not any(name.startswith(f'{item}/') for name in wanted)]:
    return f'{MANIFEST} lists nothing of {missing[0]}'
  for name, (size, _) in wanted.items():  # all sizes first: they are told in no time
    found = folder / name
    if not found.is_file():
      return f'{name} is missing'
    if found.stat().st_size != size:
      return f'{name} has {found.stat().st_size} bytes, not {size}'
  own = sorted(wanted)[share[0] :: share[1]]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    for name, found in zip(own, pool.map(lambda name: _try_measure(folder / name), own), strict=True):
      if found != wanted[name]:
        return f'{name} is damaged: {found}' if isinstance(found, str) else f'{name} is damaged: its SHA-256 is not the sealed one'
  return None


def write_sealed(path: pathlib.Path, content: Any) -> None:
  """Writes JSON followed by a line with its own SHA-256, all or nothing."""
  text = json.dumps(content, separators=(',', ':'), allow_nan=False)
  temporary = path.with_name(path.name + '.tmp')
  with temporary.open('w', encoding='utf-8') as file:
    file.write(f'{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n')
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)


def read_sealed(path: pathlib.Path) -> Any:
  """The reverse of `write_sealed`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it isn't what was written.
  """
  if path.stat().st_size > MAX_MANIFEST_BYTES:
    raise ValueError(f'over {MAX_MANIFEST_BYTES} bytes')
  text, end, rest = path.read_bytes().partition(b'\n')
  if rest != hashlib.sha256(text).hexdigest().encode() + b'\n' or not end:
    raise ValueError('its last line is not the SHA-256 of the first')
  try:
    return json.loads(text)
  except RecursionError as error:
    raise ValueError('nested too deeply') from error


def _measure(path: pathlib.Path) -> list[Any]:
  with path.open('rb') as file:
    return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, 'sha256').hexdigest()]


def _changed(path: pathlib.Path) -> int:
  return path.stat().st_mtime_ns


def _try_measure(path: pathlib.Path) -> list[Any] | str:
  try:
    return _measure(path)
  except OSError as error:  # a disk that can't read it any more
    return error.strerror or str(error)
