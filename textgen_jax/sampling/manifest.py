"""Manifests: texts with all that it takes to write them again, byte for byte.

A file of JSON lines. The header has the format's number, SHA-256 of the parameters and of the tokenizer, versions, device, batch size
and the distinct settings; then comes a line a text, `Completion.row()` and the number of its settings. No times and no paths, so that
equal work writes equal bytes. A number that isn't finite is null.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import types
import typing
from collections.abc import Sequence
from typing import Any

import flax
import jax
import jaxlib
import numpy as np

from textgen_jax import errors, trees
from textgen_jax.sampling import journal
from textgen_jax.sampling import params as params_lib
from textgen_jax.sampling.params import SamplingParams
from textgen_jax.text import base

FORMAT = 1
MAX_BYTES = 1 << 28
_FIELDS: dict[str, type] = {
  'format': int,
  'batch_size': int,
  'tokenizer_sha256': str,
  **dict.fromkeys(('checkpoint', 'draft', 'versions', 'platform'), dict),
  **dict.fromkeys(('transforms', 'settings'), list),
}


@dataclasses.dataclass(frozen=True)
class Manifest:
  """A manifest file, read."""

  path: str
  header: dict[str, Any]
  prompts: list[str]
  settings: list[SamplingParams]  # of each prompt
  lines: list[str]  # of the file, with their ends


def params_sha256(params: Any) -> str:
  """SHA-256 over name, shape, type and bytes of all leaves."""
  content = hashlib.sha256()
  for name, leaf in trees.named_leaves(params):
    array = np.asarray(jax.device_get(leaf))
    content.update(f'{name} {array.shape} {array.dtype}\n'.encode())
    content.update(np.ascontiguousarray(array).tobytes())
  return content.hexdigest()


def versions() -> dict[str, str]:
  """Of what decides how logits are rounded and how tokens are drawn."""
  try:
    own = importlib.metadata.version('textgen_jax')
  except importlib.metadata.PackageNotFoundError:
    own = 'not installed'
  found = {module.__name__: module.__version__ for module in (jax, jaxlib, flax, np)}
  return {'python': platform.python_version(), **found, 'textgen_jax': own}


def device() -> dict[str, Any]:
  # Rows are drawn in a thread a core, and logits are rounded by how many rows there are.
  return {'kind': jax.devices()[0].device_kind, 'count': jax.device_count(), 'cores': os.cpu_count()}


def lines(header: dict[str, Any], rows: Sequence[dict[str, Any]], settings: Sequence[SamplingParams]) -> list[str]:
  """The file of these texts.

  Args:
    header: all of it but the settings.
    rows: of the texts, in the prompts' order, `num_samples` a prompt.
    settings: of each prompt.
  """
  each, numbers = distinct(settings)
  of_rows = [number for one, number in zip(settings, numbers, strict=True) for _ in range(one.num_samples)]
  # Escaped: a flag's bytes that aren't UTF-8 come as half surrogate pairs, which no encoding but JSON's own holds.
  first = json.dumps({**header, 'settings': [settings_to_json(one) for one in each]}, allow_nan=False) + '\n'
  return [first, *(journal.line({**row, 'settings': i}) for row, i in zip(rows, of_rows, strict=True))]


def distinct(settings: Sequence[SamplingParams]) -> tuple[list[SamplingParams], list[int]]:
  """Different settings, and which of them each one is."""
  number = {one: i for i, one in enumerate(dict.fromkeys(settings))}
  return list(number), [number[one] for one in settings]


def settings_to_json(settings: SamplingParams) -> dict[str, Any]:
  """Every field, so that a default that changes later changes nothing here."""
  return json.loads(journal.line(dataclasses.asdict(settings)))


def settings_from_json(content: Any, where: str) -> SamplingParams:
  """The reverse of `settings_to_json`. Fields that are missing get their defaults.

  Args:
    content: parsed JSON.
    where: file and place, for errors.

  Raises:
    UserError: an unknown field, a value of another type or out of its range.
  """
  if not isinstance(content, dict):
    raise errors.UserError(f'{where}: {content!r:.60} is not an object')
  hints = {field.name: field.type for field in dataclasses.fields(SamplingParams)}
  taken = {}
  for name, value in content.items():
    if name not in hints:
      raise errors.UserError(f'{where}: {errors.not_among("field", name, hints)}')
    value = -math.inf if value is None and hints[name] is float else value
    if not _fits(value, hints[name]):
      raise errors.UserError(f'{where}: {name}={value!r:.60} is of another type than the field')
    taken[name] = _tuples(value)
  try:
    return SamplingParams(**taken)
  except errors.UserError as error:
    raise errors.UserError(f'{where}: {error}') from error


def _fits(value: Any, hint: Any) -> bool:
  if isinstance(hint, types.GenericAlias):
    items = typing.get_args(hint)
    if not isinstance(value, list):
      return False
    each = [items[0]] * len(value) if items[-1] is ... else list(items)
    return len(value) == len(each) and all(map(_fits, value, each))
  if hint is float:
    # An int of more digits than a float has room for can't be one.
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)
  return type(value) is hint


def _tuples(value: Any) -> Any:
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def read(path: str | os.PathLike) -> Manifest:
  """Reads a manifest.

  Raises:
    UserError: names the file, the line and what is wrong there.
  """
  name = f'reproduce={str(path)!r}'
  texts, rows = [], []
  data = base.read_bounded(path, MAX_BYTES, 'reproduce')
  for number, one in enumerate(data.removesuffix(b'\n').split(b'\n') if data else [], start=1):
    text, content = _object(one, f'{name}, line {number}')
    texts.append(text + '\n')
    if number == 1:
      header = _header(content, f'{name}, line 1')
      each = [settings_from_json(content, f'{name}, settings {i}') for i, content in enumerate(header['settings'])]
    else:
      rows.append({key: content.get(key) for key in ('prompt', 'settings')})  # tokens as objects would take the most memory
  if not texts:
    raise errors.UserError(f'{name} is empty, and no manifest')
  if not rows:
    raise errors.UserError(f'{name} holds no text')
  prompts, settings = _prompts(rows, each, name)
  return Manifest(str(path), header, prompts, settings, texts)


def _object(one: bytes, where: str) -> tuple[str, dict[str, Any]]:
  def refuse(constant: str) -> None:
    raise ValueError(f'{constant} is not JSON')

  try:
    text = one.decode('utf-8')
    content = json.loads(text, parse_constant=refuse)
  except UnicodeDecodeError as error:
    raise errors.UserError(f"{where} isn't UTF-8 at byte {error.start}") from error
  except (ValueError, RecursionError) as error:
    raise errors.UserError(f'{where} is not JSON: {error!s:.100}') from error
  if not isinstance(content, dict):
    raise errors.UserError(f'{where}: {text:.60} is not an object')
  return text, content


def _header(content: dict[str, Any], where: str) -> dict[str, Any]:
  if type(content.get('format')) is not int or content['format'] != FORMAT:
    raise errors.UserError(f'{where}: format={content.get("format")!r:.60} is not {FORMAT}: no manifest that sample.py can read')
  for name, wanted in _FIELDS.items():
    if type(content.get(name)) is not wanted:
      raise errors.UserError(f'{where}: {name}={content.get(name)!r:.60} must be of type {wanted.__name__}')
  for name in content:
    if name not in _FIELDS:
      raise errors.UserError(f'{where}: {errors.not_among("field", name, _FIELDS)}')
  sha256, step = content['checkpoint'].get('params_sha256'), content['checkpoint'].get('step', '')
  if not isinstance(sha256, str):
    raise errors.UserError(f'{where}: checkpoint.params_sha256={sha256!r:.60} is not a string')
  if not (step is None or (type(step) is int and 0 <= step < 2**63)):
    raise errors.UserError(f'{where}: checkpoint.step={step!r:.60} is no step')
  try:
    params_lib.check_batch_size(content['batch_size'])
  except errors.UserError as error:
    raise errors.UserError(f'{where}: {error}') from error
  return content


def _prompts(rows: list[dict[str, Any]], each: list[SamplingParams], name: str) -> tuple[list[str], list[SamplingParams]]:
  """Each prompt, and its settings, from the rows of its texts."""
  prompts, settings, at = [], [], 0
  while at < len(rows):
    prompt, number = rows[at].get('prompt'), rows[at].get('settings')
    if not isinstance(prompt, str):
      raise errors.UserError(f'{name}, line {at + 2}: prompt={prompt!r:.60} is not a string')
    if type(number) is not int or not 0 <= number < len(each):
      raise errors.UserError(f'{name}, line {at + 2}: settings={number!r:.60} is none of the {len(each)} in the header')
    one = each[number]
    of_prompt = rows[at : at + one.num_samples]
    if len(of_prompt) < one.num_samples or any((row.get('prompt'), row.get('settings')) != (prompt, number) for row in of_prompt):
      raise errors.UserError(f'{name}, line {at + 2}: num_samples={one.num_samples}, and not so many texts of this prompt follow')
    prompts.append(prompt)
    settings.append(one)
    at += one.num_samples
  return prompts, settings


def refuse_other(wanted: Manifest, header: dict[str, Any]) -> None:
  """Raises UserError where the texts were made from other parameters, with another tokenizer or other transforms."""
  pairs = [
    ('checkpoint', 'parameters have SHA-256', wanted.header['checkpoint']['params_sha256'], header['checkpoint']['params_sha256']),
    ('tokenizer', 'tokenizer has SHA-256', wanted.header['tokenizer_sha256'], header['tokenizer_sha256']),
  ]
  for what, has, old, new in pairs:
    if old != new:
      raise errors.UserError(f'reproduce={wanted.path!r} was written with another {what}: its {has} {old:.12}, and here it is {new:.12}')
  for name in ('draft', 'transforms'):
    old, new = wanted.header[name], header[name]
    if old != new:
      raise errors.UserError(f'reproduce={wanted.path!r} was written with {name}={old!s:.120}, and here it is {new!s:.120}')


def differences(wanted: Manifest, header: dict[str, Any]) -> list[str]:
  """What else the header tells of the machine, `versions.jax=0.10.2, now 0.11.0`: there the rounding may differ."""
  found = []
  for group in ('versions', 'platform'):
    old, new = wanted.header[group], header[group]
    found += [f'{group}.{name}={old.get(name)!s:.60}, now {new.get(name)}' for name in {**old, **new} if old.get(name) != new.get(name)]
  return found


def first_difference(wanted: Manifest, written: Sequence[str]) -> int | None:
  """The number of the first text's line that isn't the same, from 1, which is the header's; None where there is none."""
  pairs = zip(wanted.lines[1:], written[1:], strict=True)
  return next((number for number, (old, new) in enumerate(pairs, start=2) if old != new), None)
