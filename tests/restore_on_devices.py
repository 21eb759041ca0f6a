"""Saves a state on many fake devices, or restores it on fewer and saves it again: as a process of its own, for their number is fixed.

  python tests/restore_on_devices.py NUM_DEVICES WORKDIR [ARRAYS.npz]

With ARRAYS.npz it makes a state and writes its arrays there; without, it takes the newest step of the workdir.
"""

import pathlib
import sys

import jax
import numpy as np

from textgen_jax import trees
from textgen_jax.training import checkpoints, health, state

ODD = np.array([-0.0, np.nan, np.inf, 1e-45, 1 / 3, 16777217.0, 1, 2], np.float32)  # what a cast or a print would lose


def make(num_devices):
  """Where a state's arrays lie when rows are split over all devices, and the arrays."""
  devices = jax.make_mesh((num_devices,), ('d',), axis_types=(jax.sharding.AxisType.Auto,))
  split = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec('d'))
  whole = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec())
  rng = np.random.default_rng(0)
  params = {'split': rng.standard_normal((8, 3)).astype(np.float32), 'odd': ODD, 'half': ODD.astype(jax.numpy.bfloat16)}
  arrays = state.TrainState(
    step=np.int32(5),
    updates=np.int32(4),
    data_offset=np.int32(3),
    health=jax.tree.map(np.asarray, health.fresh()),
    root_key=np.array([1, 2**32 - 1], np.uint32),
    params=params,
    trained=None,
    opt_state={'mu': rng.standard_normal((8, 3)).astype(np.float32)},
    carry=rng.standard_normal((8, 2)).astype(np.float32),
  )
  return arrays, jax.tree.map(lambda x: split if x.ndim and x.shape[0] == 8 else whole, arrays)


def restore(workdir, num_devices):
  """The newest step's state, laid out over the devices."""
  kept = checkpoints.Checkpoints(workdir)
  arrays, shardings = make(num_devices)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
  return kept, kept.restore(kept.newest_good(), checkpoints.with_shardings(abstract, shardings))


def main(num_devices, workdir, arrays_file=None):
  jax.config.update('jax_num_cpu_devices', num_devices)
  if arrays_file:
    arrays, shardings = make(num_devices)
    found, kept, step = jax.device_put(arrays, shardings), checkpoints.Checkpoints(workdir), 1
    np.savez(arrays_file, **{name: np.frombuffer(np.asarray(leaf).tobytes(), np.uint8) for name, leaf in trees.named_leaves(arrays)})
  else:
    kept, found = restore(workdir, num_devices)
    step = kept.steps()[-1] + 1
  assert len(found.params['split'].sharding.device_set) == num_devices
  kept.save(step, found, {})
  kept.close()


if __name__ == '__main__':
  main(int(sys.argv[1]), pathlib.Path(sys.argv[2]), *sys.argv[3:])
