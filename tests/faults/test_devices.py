"""A checkpoint is restored on any number of devices, bit for bit; tests/test_sharding.py lets a run go on there."""

import os
import subprocess
import sys

import fault_runs
import numpy as np
import restore_on_devices

from textgen_jax import trees

SCRIPT = restore_on_devices.__file__


def test_four_devices_then_two_then_one(tmp_path):
  environment = {**os.environ, 'PYTHONPATH': str(fault_runs.ROOT), 'JAX_PLATFORMS': 'cpu'}
  for num_devices, *more in ((4, str(tmp_path / 'arrays.npz')), (2,)):
    command = [sys.executable, SCRIPT, str(num_devices), str(tmp_path / 'run'), *more]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
  kept, found = restore_on_devices.restore(tmp_path / 'run', 1)
  assert kept.steps() == [2]  # the one that two devices saved
  with np.load(tmp_path / 'arrays.npz') as arrays:
    leaves = trees.named_leaves(found)
    assert sorted(name for name, _ in leaves) == sorted(arrays)
    for name, leaf in leaves:
      assert np.asarray(leaf).tobytes() == arrays[name].tobytes(), name
