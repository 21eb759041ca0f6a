"""Memory that was freed stays with the process."""

import ctypes
import glob
import os
import sys

# Parameters of glibc's malloc.h, and their values.
_SETTINGS = (
  (-4, 0),  # M_MMAP_MAX: blocks that have a mapping of their own, which goes with them
  (-8, 1),  # M_ARENA_MAX
  (-1, 2**31 - 1),  # M_TRIM_THRESHOLD: bytes at the heap's end that stay
  (-2, 64 << 20),  # M_TOP_PAD: bytes more than are needed, when it grows
)
MOST_CORES = 4  # of 2, where it pays, and 16, where it doesn't, alone measured
ACCELERATORS = ('/dev/nvidiactl', '/dev/dxg', '/dev/kfd', '/dev/accel[0-9]*', '/dev/vfio/[0-9]*')  # NVIDIA (Linux, WSL), AMD, Google


def keep_memory() -> None:
  """Has malloc keep what is freed, on Linux with glibc and few cores, unless the user has settled malloc by its environment variables.

  XLA's CPU backend allocates each step's buffers anew. By default malloc returns them to the kernel, which then has every page to clear
  and to map again in the next step: 1,157 ms a step became 966 (10.6 M parameters), and 173 tokens/s of 16 rows became 244 (85 M). The
  price is memory, of which blocks of many sizes leave parts unused: 3.0 GB where it was 1.3 (2.7 M parameters, Muon). To be called before
  any thread is started: those that have allocated have an arena of their own, where large blocks never stay.

  Not where JAX will run on an accelerator, nor on many cores: XLA compiles in as many threads, and all would wait for the one arena. On
  16 cores beside an H200 a step that compiles in 20 s was not compiled after 70.
  """
  if not sys.platform.startswith('linux') or any(name.startswith('MALLOC_') or name == 'GLIBC_TUNABLES' for name in os.environ):
    return
  if len(os.sched_getaffinity(0)) > MOST_CORES or (os.environ.get('JAX_PLATFORMS') != 'cpu' and any(map(glob.glob, ACCELERATORS))):
    return
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is not None:  # musl has none
    for parameter, value in _SETTINGS:
      mallopt(parameter, value)
