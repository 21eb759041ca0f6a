"""Prompts as files and stdin hold them."""

import json
import pathlib
import sys

from textgen_jax import errors
from textgen_jax.text import base

MAX_BYTES = 1 << 28  # of a file or of stdin; in short lines they take ten times as much memory


def read_stdin() -> list[str]:
  """A prompt a line."""
  data = sys.stdin.buffer.read(MAX_BYTES + 1) if sys.stdin else b''
  if len(data) > MAX_BYTES:
    raise errors.UserError(f"prompts_file='-' is too large: stdin has more than {MAX_BYTES} bytes")
  return _lines(data, '-')


def _lines(data: bytes, path: str) -> list[str]:
  try:
    lines = data.decode('utf-8-sig').replace('\r\n', '\n').removesuffix('\n').split('\n')
  except UnicodeDecodeError as error:
    raise errors.UserError(f"prompts_file={path!r} isn't UTF-8 at byte {error.start}") from error
  if lines == ['']:
    raise errors.UserError(f'prompts_file={path!r} holds no prompt')
  return lines


def read(path: pathlib.Path) -> list[str]:
  """Prompts of a .txt or .jsonl file, in order.

  Raises:
    UserError: names the file, the line and what it lacks.
  """
  lines = _lines(base.read_bounded(path, MAX_BYTES, 'prompts_file'), str(path))
  if path.suffix != '.jsonl':
    prompts = lines
  else:
    prompts = []
    for number, line in enumerate(lines, start=1):
      try:
        prompt = json.loads(line)['prompt']
      except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise errors.UserError(f'prompts_file={str(path)!r}, line {number}: not {{"prompt": ...}}') from error
      if not isinstance(prompt, str):
        raise errors.UserError(f'prompts_file={str(path)!r}, line {number}: prompt={prompt!r:.60} is not a string')
      prompts.append(prompt)
  return prompts
