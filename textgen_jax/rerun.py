"""From a kept checkpoint to any step that a run has had, bit for bit."""

import contextlib
import dataclasses
from typing import Any

import jax
import numpy as np

from textgen_jax import assembly, signals
from textgen_jax.data import prefetch
from textgen_jax.training import checkpoints, health, state


def nearest(parts: assembly.Parts, kept: checkpoints.Checkpoints, step: int) -> state.TrainState:
  """The state of the newest kept step that can be read and is at most `step`; where there is none, that before the first step."""
  found = kept.first_good([one for one in reversed(kept.steps()) if one <= step])
  return parts.fresh() if found is None else kept.restore(found, checkpoints.with_shardings(parts.abstract, parts.shardings))


def advance(
  parts: assembly.Parts,
  compiled: Any,
  train_state: state.TrainState,
  stop: int,
  jumps: list[health.Jump],
  stopped: signals.Stop | None = None,
) -> state.TrainState:
  """Trains to step `stop` without a word, as the run did.

  Args:
    parts: the run's.
    compiled: the run's step; the state is donated to it.
    train_state: where to begin, after at most `stop` steps.
    stop: the last step.
    jumps: all that the run made.
    stopped: ends it early once a signal has come.

  Returns:
    The state after `stop` steps, or fewer where it was stopped.
  """
  first = int(train_state.step)
  batches = prefetch.prefetch(lambda index: parts.batch(index + health.data_offset(jumps, index + 1)), first, stop)
  with contextlib.closing(batches):
    before = None
    for batch in batches:
      train_state, sums = compiled(train_state, batch)
      jax.block_until_ready(before)  # two steps in flight, as in training
      before = sums
      if stopped and stopped.number:
        break
  return at_offset(parts, train_state, health.data_offset(jumps, int(train_state.step)))


def at_offset(parts: assembly.Parts, train_state: state.TrainState, data_offset: int) -> state.TrainState:
  """The state with another `data_offset`."""
  return dataclasses.replace(train_state, data_offset=jax.device_put(np.int32(data_offset), parts.shardings.data_offset))
