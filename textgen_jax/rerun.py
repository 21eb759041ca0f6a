"""From a kept checkpoint to any step that a run has had, bit for bit."""

import contextlib
import dataclasses
from typing import Any

import jax
import numpy as np

from textgen_jax import assembly, processes, sharding, signals
from textgen_jax.data import prefetch
from textgen_jax.training import checkpoints, health, state, step


def nearest(parts: assembly.Parts, kept: checkpoints.Checkpoints, number: int) -> state.TrainState:
  """The state of the newest kept step that can be read and is at most `number`; where there is none, that before the first step."""
  with processes.resting():
    found = kept.first_good([one for one in reversed(kept.steps()) if one <= number])
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
  spans = step.spans(first, stop, parts.experiment.training.steps_per_dispatch, lambda done: False)
  with contextlib.closing(prefetch.prefetch(lambda span: inputs(parts, span, jumps), spans)) as ahead:
    before = None
    for taken in ahead:
      train_state, sums = compiled(train_state, *taken)
      jax.block_until_ready(before)  # two dispatches in flight, as in training
      processes.beat()
      before = sums
      if stopped and stopped.number:
        break
  return at_offset(parts, train_state, health.data_offset(jumps, int(train_state.step)))


def inputs(parts: assembly.Parts, span: range, jumps: list[health.Jump]) -> tuple[Any, ...]:
  """What the compiled step takes for the steps of `span`."""
  return parts.inputs([done - 1 + health.data_offset(jumps, done) for done in span])


def at_offset(parts: assembly.Parts, train_state: state.TrainState, data_offset: int) -> state.TrainState:
  """The state with another `data_offset`."""
  return dataclasses.replace(train_state, data_offset=sharding.place(np.int32(data_offset), parts.shardings.data_offset))
