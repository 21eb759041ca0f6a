"""What XLA has compiled is kept on disk, so that the second start is faster."""

import contextlib
import hashlib
import os
import pathlib
import sys
from typing import Any

import jax
from jax._src import compilation_cache

from textgen_jax import experiment as experiment_lib
from textgen_jax import sharding
from textgen_jax.data import downloads
from textgen_jax.models import base, build

_SHA256_BYTES = 32
FEWEST_RECURRENT_ROWS = 16  # of a device among several: each reads the recurrent kernel at each time, whatever rows it has
# Devices of one CPU that wait for each other longer than 40 s end the process: on a laptop that slept, or where many processes share cores.
_PATIENCE = '--xla_cpu_collective_call_terminate_timeout_seconds=86400'
_PATIENT_VERSIONS = ((0, 10),)  # that know the flag: an unknown one ends the process too
_jax_cache = compilation_cache.get_file_cache


def keep_compiled() -> None:
  """Turns JAX's persistent cache on, where the user has set it or else beside the prepared data."""
  if not jax.config.values['jax_compilation_cache_dir']:
    jax.config.update('jax_compilation_cache_dir', str(downloads.cache_directory() / 'xla'))
    # JAX has no place for another cache. Were this one renamed, its own would be used.
    compilation_cache.get_file_cache = _checked_cache
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    # Small models' programs take under JAX's threshold of a second each, and there are a dozen of them.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


def split_cores(experiment: experiment_lib.Experiment, several_processes: bool = False) -> None:
  """Makes a CPU's cores as many devices as `sharding.cpu_devices` says, unless the user or an earlier use of JAX has settled it.

  Each of several processes has one unless the field says more: the others may run on the same cores. Settles also who runs the steps.
  """
  flags = os.environ.get('XLA_FLAGS', '')
  if jax.config.values['jax_num_cpu_devices'] != -1 or 'xla_force_host_platform_device_count' in flags:
    return
  c = experiment.training
  rows = c.batch_size // c.accumulation_steps
  if build.carries(experiment.model):
    fewest_rows = FEWEST_RECURRENT_ROWS
  else:  # products of bfloat16 take so little of a step that a device a core loses by it: 28 ms for 35
    rounds = experiment.model.compute_dtype != 'bfloat16' and base.operand_dtype(c.product_dtype, 'cpu') == 'bfloat16'
    fewest_rows = rows if rounds else 1
  devices = sharding.cpu_devices(experiment.sharding, rows, fewest_rows)
  if several_processes and not experiment.sharding.cpu_devices:
    devices = 1
  patient = jax.__version_info__[:2] in _PATIENT_VERSIONS
  devices = devices if patient or experiment.sharding.cpu_devices else 1  # unless told to, none of several whose patience can't be set
  try:
    jax.config.update('jax_num_cpu_devices', devices)
    dispatch_at_once(devices)
  except RuntimeError:  # devices are there already
    return
  if devices > 1 and 'xla_cpu_collective' not in flags and patient:
    os.environ['XLA_FLAGS'] = f'{flags} {_PATIENCE}'.strip()


def dispatch_at_once(devices: int) -> None:
  """One device of all cores runs a step in the thread that calls it, unless the user's environment says otherwise.

  Handed to another, steps of 2.7 M parameters took 670 to 1,230 ms where this took 490 to 720; two devices took 600 to 650 either way.
  """
  if devices == 1 and 'JAX_CPU_ENABLE_ASYNC_DISPATCH' not in os.environ:
    jax.config.update('jax_cpu_enable_async_dispatch', False)


def _checked_cache(path: str) -> tuple[Any, str] | None:
  try:
    found = _jax_cache(path)
  except OSError as error:
    _tell(path, error)
    return None
  return found and (_CheckedCache(found[0]), found[1])


class _CheckedCache:
  """JAX's cache, each entry behind its SHA-256.

  JAX writes an entry in place, never writes it again, and would run one whose bits have flipped: a kill or a full disk would
  leave a warning for every start to come.
  """

  def __init__(self, cache: Any):
    self._cache, self._told = cache, False

  @property
  def _path(self) -> Any:  # JAX reads it
    return self._cache._path

  def get(self, key: str) -> bytes | None:
    try:
      entry = self._cache.get(key)
    except OSError:
      return None
    if entry is None:
      return None
    value = entry[_SHA256_BYTES:]
    if hashlib.sha256(value).digest() == entry[:_SHA256_BYTES]:
      return value
    self._drop(key)
    return None

  def put(self, key: str, value: bytes) -> None:
    try:
      self._cache.put(key, hashlib.sha256(value).digest() + value)
    except OSError as error:
      self._drop(key)
      if not self._told:
        _tell(self._path, error)
        self._told = True

  def clear(self) -> None:
    self._cache.clear()

  def _drop(self, key: str) -> None:
    for path in pathlib.Path(self._path).glob(f'{key}-*'):
      with contextlib.suppress(OSError):
        path.unlink()


def _tell(path: Any, error: OSError) -> None:
  print(f"{path}: {error.strerror or error}: what is compiled isn't kept", file=sys.stderr)
