"""The training step and all that it is made of, for one mesh: nothing of the text but its vocabulary's size."""

import math

import jax
from jax.sharding import Mesh

from textgen_jax import backend, errors, processes, sharding
from textgen_jax import experiment as experiment_lib
from textgen_jax.models import base, build
from textgen_jax.training import optimizer, state, step


def check_rows(experiment: experiment_lib.Experiment, mesh: Mesh) -> None:
  """Raises UserError where a micro-batch's rows can't be split over the mesh."""
  c, ways = experiment.training, sharding.batch_divisor(experiment.sharding, mesh)
  if c.batch_size // c.accumulation_steps % ways:
    parts = f' / training.accumulation_steps={c.accumulation_steps}' if c.accumulation_steps > 1 else ''
    raise errors.UserError(f"training.batch_size={c.batch_size}{parts} isn't divisible by the {ways} devices that rows are split over")


class Program:
  """Model, optimizer, shapes and shardings of the state, and the step; nothing of it is on a device yet.

  Args:
    experiment: what to train, resolved.
    vocab_size: ids of the tokenizer.
    mesh: of devices, which need not be here.
    hook: adds terms to the loss.

  Raises:
    UserError: something doesn't fit the mesh.
  """

  def __init__(self, experiment: experiment_lib.Experiment, vocab_size: int, mesh: Mesh, hook: step.LossHook = step.no_hook):
    e, c = experiment, experiment.training
    check_rows(e, mesh)
    self.experiment, self.mesh, self.hook = e, mesh, hook
    self.product_dtype = base.operand_dtype(c.product_dtype, backend.name(), processes.count())
    self.row_ways = sharding.batch_divisor(e.sharding, mesh)
    self.model = build.build(e.model, vocab_size, c.sequence_length, sharding.make_constrain(e.sharding, mesh))
    build.check_kernel(self.model, c.sequence_length, c.mask_documents)
    # Samples come in batches that the devices may not divide: XLA spreads them as the params lie.
    self.free_model = build.build(e.model, vocab_size, c.sequence_length)
    self.tx, average = optimizer.build(e.optimizer, sharding.make_spread(mesh)), optimizer.make_average(e.optimizer)
    carry_rows = c.batch_size if c.windows == 'contiguous' else 0
    self.init, self.abstract, self.shardings = state.create(
      self.model, self.tx, e.seed, carry_rows, e.sharding, mesh, average is not None
    )
    deviations = math.inf if c.spike_policy == 'none' else c.spike_deviations
    schedule = optimizer.make_schedule(e.optimizer)
    self.train_step = step.make_train_step(
      self.model, self.tx, schedule, c.accumulation_steps, hook, deviations, average, self.row_ways, self.product_dtype
    )
    dispatch = self.train_step if c.steps_per_dispatch == 1 else step.make_dispatch(self.train_step, c.steps_per_dispatch)
    self.step = jax.jit(dispatch, donate_argnums=0, out_shardings=(self.shardings, None))
    self.batch_sharding = sharding.batch_sharding(e.sharding, mesh)
