"""What a training run takes on devices that aren't here: sizes, memory, communication, time. Nothing is compiled."""

import dataclasses
import math
from typing import Any

import jax

from textgen_jax import experiment as experiment_lib
from textgen_jax import program, sharding, trees
from textgen_jax.models import base, build
from textgen_jax.planning import devices, footprint, traffic

# The share of a device's bfloat16 peak that a step's products are assumed to reach. Published runs come to 40 to 60% in all:
# Chowdhery et al. 2022, arXiv:2204.02311, table 3 (46% on TPU v4); Dubey et al. 2024, arXiv:2407.21783, table 4 (38 to 43% on H100).
EFFICIENCY = 0.5


@dataclasses.dataclass(frozen=True)
class Times:
  """Seconds of one step; None where the device's figures aren't known.

  products: at EFFICIENCY of the peak, those of `model.remat` included.
  recurrence: an LSTM's weights read from memory at each token of a row, forward and backward; the time that kernels take to start,
    one after another, isn't known and isn't counted.
  update: the optimizer reads and writes the state and the gradients once, at the memory's bandwidth.
  hidden: gathering parameters and summing gradients, which products can go on beside.
  waited: what the next product waits for.
  """

  products: float
  recurrence: float
  update: float
  hidden: float
  waited: float

  @property
  def step(self) -> float:
    """The longer of what goes on side by side, and then what waits: max(products, recurrence, hidden) + waited + update."""
    return max(self.products, self.recurrence, self.hidden) + self.waited + self.update


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Of one experiment on one topology."""

  mesh: dict[str, int]
  vocab: int  # padding included
  parameters: int
  non_embedding: int
  flops_per_token: int  # as `models.base` counts them, for the MFU
  tokens_per_step: int
  kernel: str  # of attention; empty for an LSTM
  footprint: footprint.Footprint
  cache: int  # of one generated row of the trained length: bytes
  traffic: list[traffic.Traffic]
  times: Times | None

  @property
  def flops_per_step(self) -> int:
    return self.flops_per_token * self.tokens_per_step


def make(experiment: experiment_lib.Experiment, vocab_size: int, topology: devices.Topology) -> Estimate:
  """The estimate.

  Args:
    experiment: resolved.
    vocab_size: ids of the tokenizer.
    topology: where it would be trained.

  Raises:
    UserError: something doesn't fit the mesh.
  """
  e, c = experiment, experiment.training
  with topology.target():
    # Shapes and places are all that is asked of the mesh.
    parts = program.Program(e, vocab_size, sharding.abstract_mesh(e.sharding, topology.count))  # type: ignore[arg-type]
    flops = base.flops_per_token(parts.model, parts.abstract.params, c.sequence_length)
    told = traffic.of_step(parts, topology)
    taken = footprint.of_step(parts)
    cache = jax.eval_shape(lambda: parts.model.init_cache(1, c.sequence_length))
    return Estimate(
      mesh=dict(parts.mesh.shape),
      vocab=footprint.vocabulary(parts),
      parameters=trees.count(parts.abstract.params),
      non_embedding=sum(leaf.size for name, leaf in trees.named_leaves(parts.abstract.params) if not footprint.is_table(name)),
      flops_per_token=flops,
      tokens_per_step=c.batch_size * c.sequence_length,
      kernel=build.kernel_of(parts.model, c.sequence_length, c.mask_documents),
      footprint=taken,
      cache=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)),
      traffic=told,
      times=_times(parts, topology, flops * c.batch_size * c.sequence_length, taken, told),
    )


def _times(
  parts: program.Program, topology: devices.Topology, flops: int, taken: footprint.Footprint, told: list[traffic.Traffic]
) -> Times | None:
  device, config, c = topology.device, parts.experiment.model, parts.experiment.training
  if device.flops is None or device.memory_bandwidth is None:
    return None
  if device.kind == 'gpu' and footprint.compute_itemsize(config) == footprint.FLOAT:
    return None  # the peak is bfloat16's
  mixing = parts.model.mixing_flops_per_token(c.sequence_length) * c.batch_size * c.sequence_length
  # What kernels of attention give isn't the result of one product, and is made again.
  again = {'full': 4 / 3, 'dots': 1 + mixing / flops, 'none': 1.0}[footprint.remat_of(config)]
  # An LSTM's gates are whole on each device: only rows share its work.
  workers = parts.row_ways if build.carries(config) else topology.count
  return Times(
    products=again * flops / (workers * device.flops * EFFICIENCY),
    recurrence=_recurrent_bytes(parts) / device.memory_bandwidth,
    update=2 * (taken.state + taken.gradients) / device.memory_bandwidth,
    hidden=math.fsum(one.seconds or 0.0 for one in told if not one.waits),
    waited=math.fsum(one.seconds or 0.0 for one in told if one.waits),
  )


def _recurrent_bytes(parts: program.Program) -> float:
  """What an LSTM reads of its recurrent kernels in a step: whole, at each time, in both passes."""
  c: Any = parts.experiment.training
  kernels = [leaf.size for name, leaf in trees.named_leaves(parts.abstract.params) if name.endswith('recurrent_kernel')]
  return 2 * c.accumulation_steps * c.sequence_length * sum(kernels) * footprint.compute_itemsize(parts.experiment.model)
