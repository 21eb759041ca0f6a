"""What a run writes down: metrics.jsonl, TensorBoard events, utilisation."""

import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax

# Dense bfloat16 peak of one device in FLOP/s, by the start of JAX's `device_kind`; from the makers' data sheets.
PEAK_FLOPS = (
  ('NVIDIA H100 PCIe', 756e12),
  ('NVIDIA H100', 989e12),
  ('NVIDIA H200', 989e12),
  ('NVIDIA B200', 2250e12),
  ('NVIDIA A100', 312e12),
  ('NVIDIA L40S', 362e12),
  ('NVIDIA L4', 121e12),
  ('NVIDIA GeForce RTX 4090', 165e12),
  ('Tesla V100', 125e12),
  ('TPU v3', 61.5e12),
  ('TPU v4', 275e12),
  ('TPU v5 lite', 197e12),
  ('TPU v5e', 197e12),
  ('TPU v5p', 459e12),
  ('TPU v5', 459e12),
  ('TPU v6 lite', 918e12),
  ('TPU v6e', 918e12),
)


def peak_flops() -> float | None:
  """FLOP/s of all devices together; None where the device's peak isn't known (CPUs)."""
  peak = peak_of(jax.devices()[0].device_kind)
  return peak and peak * jax.device_count()


def peak_of(device_kind: str) -> float | None:
  """FLOP/s of one device; None where its peak isn't known."""
  return next((peak for prefix, peak in PEAK_FLOPS if device_kind.startswith(prefix)), None)


class Writer:
  """Appends records to `metrics.jsonl` and TensorBoard; what lies past the restored step is cut.

  Args:
    workdir: where.
    restored_step: the last step that is kept.
    unscored: its scores are cut too: they are taken again.
  """

  def __init__(self, workdir: pathlib.Path, restored_step: int, unscored: bool = False):
    self._path = workdir / 'metrics.jsonl'
    self._open(restored_step, unscored)

  def _open(self, restored_step: int, unscored: bool = False) -> None:
    records = cut_after(self._path, restored_step, unscored)
    self._last = {name for record in records if record['step'] == restored_step for name in record}
    self._restored_step = restored_step
    self._file = self._path.open('a', encoding='utf-8')
    self._events = _tensorboard().SummaryWriter(str(self._path.parent), purge_step=restored_step + 1)

  def go_back(self, restored_step: int) -> None:
    """Cuts what lies past a step that training goes on from once more."""
    self.close()
    self._open(restored_step)

  def write(self, step: int, values: dict[str, Any]) -> None:
    self._file.write(json.dumps({'step': step, **values}) + '\n')
    self._file.flush()
    for name, value in values.items():
      if value is not None:  # not finite; TensorBoard takes no None
        self._events.add_scalar(name, value, step)

  def has(self, step: int, name: str) -> bool:
    """Whether the restored step has a value of that name in the file."""
    return step == self._restored_step and name in self._last

  def text(self, step: int, name: str, text: str) -> None:
    self._events.add_text(name, '```\n' + text + '\n```', step)

  def flush(self) -> None:
    self._events.flush()

  def close(self) -> None:
    self._file.close()
    self._events.close()


class Unwritten:
  """A writer for the processes that leave writing to another."""

  def go_back(self, restored_step: int) -> None: ...

  def write(self, step: int, values: dict[str, Any]) -> None: ...

  def has(self, step: int, name: str) -> bool:
    del step, name
    return False

  def text(self, step: int, name: str, text: str) -> None: ...

  def flush(self) -> None: ...

  def close(self) -> None: ...


def _tensorboard() -> Any:
  """tensorboardX without torch, which it imports for the sake of annotations: 1.5 s and 470 MB where torch is installed."""
  hidden = 'torch' not in sys.modules
  if hidden:
    sys.modules['torch'] = None  # type: ignore[assignment]  # an ImportError, which tensorboardX is prepared for
  try:
    import tensorboardX
  finally:
    if hidden:
      del sys.modules['torch']
  return tensorboardX


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The records, but for what a killed process or a full disk left unfinished."""
  return [record for record, _ in _read_lines(path)]


def _read_lines(path: pathlib.Path) -> Iterator[tuple[dict[str, Any], str]]:
  for line in path.read_text(encoding='utf-8', errors='replace').splitlines() if path.exists() else []:
    try:
      record = json.loads(line)
    except (ValueError, RecursionError):
      continue
    if isinstance(record, dict) and isinstance(record.get('step'), int):
      yield record, line + '\n'


def cut_after(path: pathlib.Path, step: int, unscored: bool = False) -> list[dict[str, Any]]:
  """Drops records past `step`, its scores where it is `unscored`, and what `read` passes over.

  Returns:
    The records that are left.
  """
  if not path.exists():
    return []

  def stays(record: dict[str, Any]) -> bool:
    scored = any(name.startswith('val') for name in record)
    return record['step'] < step or (record['step'] == step and not (unscored and scored))

  kept = [(record, line) for record, line in _read_lines(path) if stays(record)]
  temporary = path.with_suffix('.tmp')
  temporary.write_text(''.join(line for _, line in kept), encoding='utf-8')
  os.replace(temporary, path)
  return [record for record, _ in kept]


def jsonable(value: float | None) -> float | None:
  """JSON has no NaN: a number that isn't finite is written as null."""
  return value if value is not None and abs(value) < float('inf') else None
