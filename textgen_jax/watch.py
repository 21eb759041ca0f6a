"""Looks at every finished step: what was skipped and why, when training has diverged, and the way back from a spike."""

import dataclasses
import signal
from typing import Any

import jax
import numpy as np

from textgen_jax import assembly, errors, rerun, sharding, signals
from textgen_jax.training import checkpoints, diagnose, health, progress, state, step

MOST_DIAGNOSES = 5  # of skipped steps, by one process; each takes about as long as a step


class Watch:
  """What the loop knows of skipped steps, spikes and rollbacks."""

  def __init__(self, parts: assembly.Parts):
    self.parts, self.config = parts, parts.experiment.training
    self.jumps = health.jumps_from((parts.stored or {}).get('data_jumps'))
    self._diagnose = diagnose.make_diagnose(parts.model, parts.hook, self.config.accumulation_steps, parts.product_dtype)
    self._diagnoses = 0
    self._spiked = self._spike_step = self._rollbacks = 0

  def begin(self, train_state: state.TrainState) -> None:
    """Where training goes on from `train_state`."""
    offset = int(train_state.data_offset)
    self.jumps = [jump for jump in self.jumps if jump.data_offset <= offset]  # each one leads further on
    fares = jax.device_get(train_state.health)
    self._spiked, self._spike_step, self._rollbacks = int(fares.spiked_steps), int(fares.spike_step), int(fares.rollbacks)

  def inputs(self, span: range) -> tuple[Any, ...]:
    """What the compiled step takes for the steps of `span`."""
    return rerun.inputs(self.parts, span, self.jumps)

  def look(self, done: int, sums: step.Sums, train_state: state.TrainState) -> None:
    """Waits for step `done`, whose numbers are `sums`, and acts on them.

    Args:
      done: the step.
      sums: its numbers.
      train_state: of that step or a later one; its parameters are those of the step as long as none was applied since: with
        `training.steps_per_dispatch` some may have been, and `tools.replay` tells more than the diagnosis here.

    Raises:
      Diverged: too many steps in a row were skipped.
      Spiked: the step is to be rolled back.
    """
    in_a_row = int(sums['skipped_in_a_row'][0])
    if not in_a_row:
      return
    values = step.means(sums)
    spiked, self._spiked = values['spiked_steps'] > self._spiked, int(values['spiked_steps'])
    if spiked and self.config.spike_policy == 'rollback':
      raise health.Spiked(done, values['loss'])
    if in_a_row >= min(self.config.max_skipped_steps, self.config.num_steps):
      why = 'losses were spikes or not finite' if spiked else f'step {done}: {self._diagnosis(done, train_state)}'
      raise errors.Diverged(f'steps {done - in_a_row + 1} to {done}: no update was applied; {why}')
    if spiked:
      progress.say(f'step {done}: a loss of {values["loss"]:.4f} nats is a spike; the update is skipped')
    elif in_a_row == 1 and self._diagnoses < MOST_DIAGNOSES:
      self._diagnoses += 1
      progress.say(f'step {done} is skipped: {self._diagnosis(done, train_state)}')

  def _diagnosis(self, done: int, train_state: state.TrainState) -> str:
    key = jax.random.fold_in(train_state.root_key, done - 1)
    try:
      batch = self.parts.batch(done - 1 + health.data_offset(self.jumps, done))
      return self._diagnose(train_state.weights, train_state.carry, batch, key)
    except RuntimeError as error:  # memory may not do for it
      return f'its loss or gradient is not finite (it could not be run again: {checkpoints.first_line(error)[:80]})'

  def roll_back(self, compiled: Any, spike: health.Spiked, kept: checkpoints.Checkpoints, stop: signals.Stop) -> state.TrainState:
    """The state `rollback_steps` before a spike, from where training goes on with the batches after it.

    Wherever checkpoints stand, it is the same state: the way to it from the nearest is trained again. A run that is
    killed after it goes the same way from the checkpoints that are left, meets the same spike, and comes back here.

    Source: Chowdhery et al. 2022, arXiv:2204.02311, section 5.1.

    Raises:
      Diverged: too many rollbacks didn't get past the spike.
      Stopped: a signal came on the way.
    """
    back = max(0, spike.step - self.config.rollback_steps)
    rollbacks = 1 + (self._rollbacks if spike.step <= self._spike_step else 0)
    told = f'step {spike.step}: a loss of {spike.loss_nats:.4f} nats is a spike'
    if rollbacks > health.MOST_ROLLBACKS:
      raise errors.Diverged(f'{told}, and {health.MOST_ROLLBACKS} rollbacks did not get past step {self._spike_step}')
    offset = health.data_offset(self.jumps, spike.step) + spike.step - back
    progress.say(f'{told}: going back to step {back}, and on with the batches after it')
    kept.forget_after(back)
    jumps = [jump for jump in self.jumps if jump.step <= back]
    train_state = rerun.advance(self.parts, compiled, rerun.nearest(self.parts, kept, back), back, jumps, stop)
    if int(train_state.step) < back:
      saved = max(kept.steps(), default=0)
      name = signal.Signals(stop.number).name
      raise errors.Stopped(f'{name}: on the way back from a spike; the same command goes on from step {saved}', stop.number)
    self.jumps = [*jumps, health.Jump(back + 1, offset)]
    place = self.parts.shardings.health
    fares = dataclasses.replace(
      train_state.health,
      spike_step=sharding.place(np.int32(max(spike.step, self._spike_step)), place.spike_step),
      rollbacks=sharding.place(np.int32(rollbacks), place.rollbacks),
    )
    return rerun.at_offset(self.parts, dataclasses.replace(train_state, health=fares), offset)
