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


def seal(folder: pathlib.Path, name: str) -> None:
  """Writes the manifest of all files below `folder`: their sizes and SHA-256, and the name that the folder is about to bear."""
  names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())
  hashed = [name for name in names if name.rpartition('/')[2] not in UNSEALED]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    sums = dict(zip(hashed, pool.map(lambda name: _measure(folder / name), hashed), strict=True))
  write_sealed(folder / MANIFEST, {'name': name, 'files': sums})


def problem(folder: pathlib.Path, items: Sequence[str]) -> str | None:
  """What is wrong with the `items` (subfolders) of a sealed folder, naming the file; None where each bit is as it was sealed."""
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
  with concurrent.futures.ThreadPoolExecutor() as pool:
    for name, found in zip(wanted, pool.map(lambda name: _try_measure(folder / name), wanted), strict=True):
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


def _try_measure(path: pathlib.Path) -> list[Any] | str:
  try:
    return _measure(path)
  except OSError as error:  # a disk that can't read it any more
    return error.strerror or str(error)
