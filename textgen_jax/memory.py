"""Whether a step fits the devices' memory, and which settings take less."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from textgen_jax import assembly, errors
from textgen_jax.training import checkpoints


def peak_bytes(compiled: Any) -> int | None:
  """What one call of the step takes on each device, state included; None where XLA doesn't tell."""
  found = compiled.memory_analysis()
  # XLA's own peak_memory_in_bytes leaves out on CPU what is allocated during the call.
  return found and found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes


def limit_bytes() -> int | None:
  """What this process may take of one device; None where it isn't known, as on CPU."""
  with contextlib.suppress(RuntimeError):  # backends that keep no count may say so that way
    return (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')
  return None


def smaller(parts: assembly.Parts) -> str:
  """Which settings would take less memory in a step, for the end of a sentence."""
  e, c = parts.experiment, parts.experiment.training
  if parts.stored:  # none of these may change when a run goes on
    return 'more devices would need less of each'
  found = []
  # An LSTM has no such field. On CPU the compiled step of 3 blocks took as much with it as without, 1.9 MiB.
  if getattr(e.model, 'remat', 'full') != 'full' and jax.default_backend() != 'cpu':
    found.append("model.remat='full'")
  steps = (n for n in range(c.accumulation_steps + 1, c.batch_size + 1) if c.batch_size % n == c.batch_size // n % parts.row_ways == 0)
  found += [f'training.accumulation_steps={n}' for n in steps][:1]
  return f'{" or ".join(found) or "a smaller model.dim or training.sequence_length"} would need less'


@contextlib.contextmanager
def explained(advice: str) -> Iterator[None]:
  """Turns what XLA says where memory doesn't do into one line that ends with `advice`.

  Raises:
    MachineFailed: memory didn't do.
  """
  try:
    yield
  except (MemoryError, RuntimeError) as error:
    if not errors.is_out_of_memory(error):
      raise
    raise errors.MachineFailed(f'out of memory: {checkpoints.first_line(error)}; {advice}') from error
