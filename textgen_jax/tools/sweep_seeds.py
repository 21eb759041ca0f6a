"""Trains one experiment with several seeds, each as train.py does, and scores them on val. Nothing is written."""

import collections
import concurrent.futures
import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from textgen_jax import assembly, trees
from textgen_jax.data import prefetch
from textgen_jax.tools.sweep_results import Outcome
from textgen_jax.training import checkpoints, evaluate, progress, state, step

# Parameters up to which all seeds are one program. On two CPU cores three of them took 0.61 of one's time a step and seed at 11,360
# parameters, 1.06 at 41,248, 1.00 at 140,544 (LSTM) and 1.15 at 805,760; in a thread each they took 0.72, 0.52, 0.56 and 0.94 to 1.00.
MOST_IN_ONE_PROGRAM_ON_CPU = 20_000
# Elsewhere a small step is bound by the launches of its kernels, which one program makes once for all seeds; not measured.
MOST_IN_ONE_PROGRAM = 5_000_000


class Told:
  """The progress of all seeds and settings together, told from any thread."""

  def __init__(self, num_steps: int):
    self._bar, self._lock = progress.Progress(0, num_steps), threading.Lock()
    self._steps = self._tokens = 0
    self._began = time.monotonic()

  def trained(self, steps: int, tokens: int, loss_nats: float | None) -> None:
    """So many steps more, of all seeds, on so many tokens; `loss_nats` where a line is due."""
    with self._lock:
      self._steps, self._tokens = self._steps + steps, self._tokens + tokens
      self._bar.advance(steps)
      if loss_nats is not None:
        # From the start on: seeds that train side by side report by turns, a moment apart.
        self._bar.log(self._steps, loss_nats, self._tokens / max(time.monotonic() - self._began, 1e-9), None)

  @property
  def tokens(self) -> int:
    return self._tokens

  def close(self) -> None:
    self._bar.close()


def train(parts: Sequence[assembly.Parts], told: Told) -> Generator[list[Outcome], None, None]:
  """Trains the seeds of one experiment in the way that takes the least time here, and yields what became of them as they end.

  Args:
    parts: of each seed; they differ in nothing else.
    told: hears of every step.
  """
  if len(parts) > 1 and fits_one_program(parts[0]):
    yield _Run(parts, jax.jit(jax.vmap(parts[0].train_step), donate_argnums=0), TOGETHER, told, threading.Event()).finish()
    return
  first = parts[0]
  program = jax.jit(first.train_step, donate_argnums=0, out_shardings=(first.shardings, None))
  compiled = program.lower(checkpoints.with_shardings(first.abstract, first.shardings), first.batch(0)).compile()
  ended = threading.Event()
  pool = concurrent.futures.ThreadPoolExecutor(side_by_side(len(parts)), thread_name_prefix='seed')
  try:
    runs = [pool.submit(_Run([one], compiled, ALONE, told, ended).finish) for one in parts]
    for run in concurrent.futures.as_completed(runs):
      yield run.result()
  finally:
    ended.set()
    pool.shutdown(cancel_futures=True)


def fits_one_program(parts: assembly.Parts) -> bool:
  most = MOST_IN_ONE_PROGRAM_ON_CPU if jax.default_backend() == 'cpu' else MOST_IN_ONE_PROGRAM
  return parts.mesh.size == 1 and trees.count(parts.abstract.params) <= most


def side_by_side(seeds: int) -> int:
  """How many seeds train at a time, a thread each."""
  # A small step leaves CPU cores idle: with two threads on two cores a step and seed took 0.56 to 0.58 of the time at 37,504 to
  # 140,544 parameters, and 0.89 to 0.97 at 805,760 and 2,135,040. Several devices, or one that is no CPU, are busy with one seed.
  return min(seeds, os.cpu_count() or 1) if jax.default_backend() == 'cpu' and jax.device_count() == 1 else 1


class Layout(NamedTuple):
  """How the seeds of a program share its arrays."""

  join: Callable[[Any, Sequence[Any]], Any]  # how to stack leaves, a tree a seed -> one tree
  part: Callable[[Any, int], Any]  # that tree, number -> the tree of one seed


ALONE = Layout(lambda stack, trees: trees[0], lambda tree, number: tree)
TOGETHER = Layout(
  lambda stack, trees: jax.tree.map(lambda *leaves: stack(leaves), *trees), lambda tree, number: jax.tree.map(lambda x: x[number], tree)
)


class Left(Exception):
  """The sweep has ended: nobody waits for this seed."""


class _Run:
  """Seeds that one program trains."""

  def __init__(self, parts: Sequence[assembly.Parts], compiled: Any, layout: Layout, told: Told, ended: threading.Event):
    self.parts, self.compiled, self.layout, self.told, self.ended = parts, compiled, layout, told, ended
    self.config = parts[0].experiment.training
    self.curves: list[list[tuple[int, float]]] = [[] for _ in parts]
    self.scores: list[evaluate.Score | None] = [None for _ in parts]  # the latest of a curve
    self.diverged: list[int | None] = [None for _ in parts]

  def finish(self) -> list[Outcome]:
    """Everything from the first step to the score of the last."""
    c = self.config
    train_state = self.layout.join(jnp.stack, [one.fresh() for one in self.parts])
    running: collections.deque[tuple[int, step.Sums]] = collections.deque()
    with contextlib.closing(prefetch.prefetch(self.batch, range(c.num_steps))) as batches:
      for done, batch in enumerate(batches, start=1):
        train_state, sums = self.compiled(train_state, batch)
        running.append((done, sums))
        while len(running) > (0 if done == c.num_steps or self.evaluates(done) else 1):  # two steps in flight, as in training
          self.look(*running.popleft())
        if self.ended.is_set():
          raise Left
        if None not in self.diverged:
          self.told.trained(len(self.parts) * (c.num_steps - done + len(running)), 0, None)
          break
        if self.evaluates(done):
          self.score(done, train_state)
    return [self.outcome(number, train_state) for number in range(len(self.parts))]

  def batch(self, index: int) -> Any:
    return self.parts[0].put(self.layout.join(np.stack, [one.windows.batch(index) for one in self.parts]))

  def evaluates(self, done: int) -> bool:
    every = self.config.eval_every_steps
    return every > 0 and (done % every == 0 or done == self.config.num_steps)

  def look(self, done: int, sums: step.Sums) -> None:
    """Waits for a step; a seed without an update for `training.max_skipped_steps` has diverged, as in training."""
    c = self.config
    in_a_row = np.atleast_1d(sums['skipped_in_a_row'][0])
    for number in np.flatnonzero(in_a_row >= min(c.max_skipped_steps, c.num_steps)):
      self.diverged[number] = self.diverged[number] or done
    loss = None
    if done % c.log_every_steps == 0 or done == c.num_steps:
      total, weight = map(np.atleast_1d, jax.device_get(sums['loss']))
      live = [number for number, at in enumerate(self.diverged) if at is None]
      loss = float((total[live] / np.maximum(weight[live], 1e-30)).mean()) if live else math.inf
    self.told.trained(len(self.parts), len(self.parts) * c.batch_size * c.sequence_length, loss)

  def score(self, done: int, train_state: state.TrainState) -> None:
    """A point of each curve, on what training evaluates by."""
    for number, parts in enumerate(self.parts):
      if self.diverged[number] is None:
        score = self.scores[number] = parts.score(self.params(number, train_state), parts.val_prefix)
        self.curves[number].append((done, loss_of(score)))

  def params(self, number: int, train_state: state.TrainState) -> Any:
    return self.layout.part(train_state.params, number)

  def outcome(self, number: int, train_state: state.TrainState) -> Outcome:
    """The whole val split's score."""
    parts, score, diverged = self.parts[number], self.scores[number], self.diverged[number]
    seed, curve = parts.experiment.seed, self.curves[number]
    if diverged is not None:
      return Outcome(seed, math.inf, None, curve, diverged)
    if score is None or parts.val_prefix is not parts.val:
      score = parts.score(self.params(number, train_state), parts.val)
    loss = loss_of(score)
    return Outcome(seed, loss, score.bits_per_byte if math.isfinite(loss) else None, curve, None)


def loss_of(score: evaluate.Score) -> float:
  """Nats a token; infinite where they aren't a number."""
  return score.loss_nats if math.isfinite(score.loss_nats) else math.inf
