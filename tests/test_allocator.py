"""Freed memory stays with the process, whichever thread freed it, unless the user has settled malloc."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FAULTS = """
import os, resource, sys, threading
from textgen_jax import allocator, signals
cores = 5 if 'cores' in sys.argv else 4
os.sched_getaffinity = lambda process: range(cores)
allocator.ACCELERATORS = ('/dev/nul[l]',) if 'accelerator' in sys.argv else ()
if 'kept' in sys.argv:
  allocator.keep_memory()
signals.watch()
def work():
  for _ in range(10):
    bytearray(64 << 20)
def faults(where):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  where()
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def in_a_thread():
  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
work()
print(faults(work), faults(in_a_thread))
"""


def faults(*argv, **environment):
  settled = ('GLIBC_TUNABLES', 'JAX_PLATFORMS')
  env = {name: value for name, value in os.environ.items() if not name.startswith('MALLOC_') and name not in settled}
  command = [sys.executable, '-c', FAULTS, *argv]
  done = subprocess.run(command, cwd=ROOT, env=env | environment, capture_output=True, text=True, timeout=60, check=True)
  return [int(count) for count in done.stdout.split()]


@pytest.mark.skipif('glibc' not in os.confstr('CS_GNU_LIBC_VERSION') if sys.platform == 'linux' else True, reason='of glibc')
def test_pages_are_mapped_once():
  pages = 10 * (64 << 20) // os.sysconf('SC_PAGE_SIZE')
  assert max(faults('kept')) < pages / 100
  assert min(faults()) > pages / 2
  assert min(faults('kept', MALLOC_TOP_PAD_='0')) > pages / 2  # the user's word stands
  for where in ('cores', 'accelerator'):
    assert min(faults('kept', where)) > pages / 2
  assert max(faults('kept', 'accelerator', JAX_PLATFORMS='cpu')) < pages / 100
