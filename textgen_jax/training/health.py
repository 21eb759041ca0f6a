"""How training fares: the losses so far, what is a spike among them, and which batches were skipped on purpose.

All that decides is part of the training state, so that a run that goes on decides as one that never stopped.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from textgen_jax import errors

WINDOW = 128  # losses that the moving mean and variance look back on, or so
FEWEST_LOSSES = 50  # before them nothing is a spike: a run's first losses fall from far above
MOST_ROLLBACKS = 5  # without getting past a spike's step

POLICIES = ('none', 'skip', 'rollback')


@struct.dataclass
class Health:
  """A part of `TrainState`. All scalars."""

  loss_mean: jax.Array  # nats a token; of the steps that were applied
  loss_variance: jax.Array
  losses: jax.Array  # how many were counted
  skipped_in_a_row: jax.Array  # steps without an update up to now
  spiked_steps: jax.Array  # that were skipped because their loss was a spike
  spike_step: jax.Array  # the furthest step that was rolled back from; 0: none
  rollbacks: jax.Array  # since `spike_step` was last got past


def fresh() -> Health:
  real, whole = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
  return Health(real, real, whole, whole, whole, whole, whole)


def is_spike(health: Health, loss_nats: jax.Array, deviations: float) -> jax.Array:
  """Whether a loss stands more than so many standard deviations above the moving mean; never with infinitely many."""
  return (health.losses >= FEWEST_LOSSES) & (loss_nats > health.loss_mean + deviations * jnp.sqrt(health.loss_variance))


def observe(health: Health, loss_nats: jax.Array, *, counts: jax.Array, applied: jax.Array, spiked: jax.Array) -> Health:
  """The next step's health.

  Mean and variance are those of all losses at first; from `WINDOW` of them on each new one weighs 1 / WINDOW.
  Source: Finch 2009, Incremental calculation of weighted mean and variance, section 9.

  Args:
    health: before the step.
    loss_nats: the step's loss.
    counts: whether the loss becomes part of mean and variance.
    applied: whether the step's update was.
    spiked: whether it wasn't because the loss was a spike.
  """
  weight = 1.0 / jnp.minimum(health.losses + 1, WINDOW).astype(jnp.float32)
  change = jnp.where(counts, loss_nats - health.loss_mean, 0.0)
  variance = (1.0 - weight) * (health.loss_variance + weight * jnp.square(change))
  return dataclasses.replace(
    health,
    loss_mean=health.loss_mean + weight * change,
    loss_variance=jnp.where(counts, variance, health.loss_variance),
    losses=health.losses + counts,
    skipped_in_a_row=jnp.where(applied, 0, health.skipped_in_a_row + 1),
    spiked_steps=health.spiked_steps + spiked,
  )


class Jump(NamedTuple):
  """From step number `step` on, batches are taken `data_offset` places further on than the step says."""

  step: int
  data_offset: int


def data_offset(jumps: list[Jump], step: int) -> int:
  """The offset of step number `step` (1, 2, ...), where `jumps` has all of the run's, the earliest first."""
  return next((jump.data_offset for jump in reversed(jumps) if jump.step <= step), 0)


def jumps_from(stored: Any) -> list[Jump]:
  """What a checkpoint tells of them, as JSON.

  Raises:
    NoGoodCheckpoint: they are no pairs of numbers.
  """
  try:
    return [Jump(int(number), int(offset)) for number, offset in stored or []]
  except (TypeError, ValueError) as error:
    raise errors.NoGoodCheckpoint(f'a checkpoint tells of rollbacks as {str(stored)[:80]}, which are no pairs of numbers') from error


class Spiked(Exception):
  """Takes the loop back to before a spike."""

  def __init__(self, step: int, loss_nats: float):
    super().__init__(f'step {step}')
    self.step, self.loss_nats = step, loss_nats
