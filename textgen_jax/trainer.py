"""The training loop: dispatch, log, evaluate, sample, save.

  from textgen_jax import trainer
  trainer.train(experiment, 'runs/name')
"""

import collections
import contextlib
import os
import pathlib
import signal
import time
from typing import Any

import jax

from textgen_jax import assembly, errors, launch, memory, processes, sharding, signals, watch, workdir
from textgen_jax import experiment as experiment_lib
from textgen_jax.data import prefetch, tokens
from textgen_jax.models import base
from textgen_jax.sampling import generate
from textgen_jax.sampling.params import SamplingParams
from textgen_jax.training import checkpoints, evaluate, health, metrics, progress, state, step


def train(experiment: experiment_lib.Experiment, directory: str | os.PathLike, hook: step.LossHook = step.no_hook) -> evaluate.Score:
  """Trains to `training.num_steps`, going on where `directory` stands.

  Args:
    experiment: what to train; it isn't changed.
    directory: the workdir: configuration, tokenizer, checkpoints and metrics.
    hook: adds terms to the loss and metrics to the log. It is called once a micro-batch,
      inside the compiled step, with `step.LossInputs` (what the modules have sown among
      them), and returns a scalar that is added to the loss *summed* over tokens, and
      `{name: (sum, weight)}`, which is logged as `train/name`.

  Returns:
    The final score on the whole val split.

  Under `jax.distributed` all processes call it alike. After `launch.join`, as in train.py, what ends one of them ends each, by `os._exit`.

  Raises:
    UserError: wrong input; nothing was written to the workdir.
    Diverged: no update was applied for `training.max_skipped_steps` in a row, or rollbacks didn't get past a spike.
    Stopped: SIGINT or SIGTERM came; the last finished step is saved. Where no finished step is unsaved, a signal does what it
      does elsewhere (KeyboardInterrupt); in a command that called `signals.watch` it ends the process.
    TimeIsUp: `time_limit_minutes` have passed; the last finished step is saved.
    NoGoodCheckpoint: there are checkpoints, and none is whole.
    MachineFailed: a checkpoint could not be saved, or memory doesn't do.
  """
  began, directory = time.monotonic(), pathlib.Path(directory)
  try:
    with contextlib.ExitStack() as stack:
      stop = stack.enter_context(signals.caught())
      with launch.together():
        with launch.alike(stack.close):
          trainer = _begin(experiment, directory, hook, stop, began, stack)
        return trainer.finish(trainer.run(stack))
  except OSError as error:
    raise errors.MachineFailed(f'{error.filename or directory}: {error.strerror or error}') from error


def _begin(
  experiment: experiment_lib.Experiment,
  directory: pathlib.Path,
  hook: step.LossHook,
  stop: signals.Stop,
  began: float,
  stack: contextlib.ExitStack,
) -> '_Trainer':
  """A trainer that has the workdir for itself, on every process."""
  processes.same({n: v for n, v in experiment_lib.flatten(experiment).items() if n not in experiment_lib.MAY_DIFFER_BY_PROCESS})

  def lock() -> None:
    stack.enter_context(workdir.locked(directory))

  stands = processes.from_leader(directory.is_dir)
  if stands:  # what another trainer is writing would look damaged
    processes.from_leader(lock)
  trainer = _Trainer(assembly.Parts(experiment, directory, hook), directory, stop, began)
  text = {"the data's fingerprint": trainer.parts.fingerprint, "the tokenizer's": trainer.parts.tokenizer.fingerprint()}
  processes.same(text | {'jax': jax.__version__})
  if not stands:
    processes.from_leader(lock)
    if workdir.stored_steps(directory):  # another trainer was here since we looked
      trainer = _Trainer(assembly.Parts(experiment, directory, hook), directory, stop, began)
  processes.all_see(directory / workdir.LOCK)
  return trainer


class _Trainer:
  """The loop's state on the host."""

  def __init__(self, parts: assembly.Parts, directory: pathlib.Path, stop: signals.Stop, began: float):
    self.parts, self.config, self.directory = parts, parts.experiment.training, directory
    self.stop, self.began = stop, began
    self.compiling = parts.start_compiling() if (parts.stored_step or 0) < self.config.num_steps else None
    self.fresh: Any = parts.fresh() if parts.stored is None else None
    self.flops_per_token = base.flops_per_token(parts.model, parts.abstract.params, self.config.sequence_length)
    self.peak_flops = metrics.peak_flops()
    self.final_score: evaluate.Score | None = None
    self.skipped = 0  # steps whose loss or gradient was not finite, as last logged
    self.watch = watch.Watch(parts)
    self.lockstep = processes.Lockstep()
    self.reason: tuple[int, str] | None = None  # why the run is to end after this step, as all processes have agreed
    self.about: dict[str, Any] = {}  # what each checkpoint tells of itself

  def run(self, stack: contextlib.ExitStack) -> state.TrainState:
    """Everything up to the last step's checkpoint and score."""
    c = self.config
    # Whatever ends the run, what was begun to be saved is saved.
    behind = c.rollback_steps if c.spike_policy == 'rollback' else 0
    kept = checkpoints.Checkpoints(self.directory, c.keep_checkpoints, keep_every=c.keep_every_steps, keep_behind=behind)
    self.kept = stack.enter_context(contextlib.closing(kept))
    train_state, first = self.start()
    # A run that was stopped while it evaluated has saved the step, and not its score.
    unscored = first > 0 and self.evaluates(first) and not self.kept.is_scored(first)
    self.writer = stack.enter_context(contextlib.closing(self.open_writer(first, unscored)))
    if unscored:
      self.score_step(first, train_state)
    if first < c.num_steps:
      with memory.explained(memory.smaller(self.parts)):
        return self.train(self.compiled(), train_state)
    progress.say(f'{self.directory} has trained {first} steps already; training.num_steps={c.num_steps} asks for no more')
    return train_state

  def open_writer(self, first: int, unscored: bool) -> metrics.Writer | metrics.Unwritten:
    return metrics.Writer(self.directory, first, unscored) if processes.is_leader() else metrics.Unwritten()

  def train(self, compiled: Any, train_state: state.TrainState) -> state.TrainState:
    """The loop, entered anew after each rollback."""
    while True:
      try:
        return self.loop(compiled, train_state, int(train_state.step))
      except health.Spiked as error:
        spike = error
      spike.__traceback__ = None  # the loop's state, gigabytes perhaps, goes before another one comes
      train_state = self.watch.roll_back(compiled, spike, self.kept, self.stop)
      back = int(train_state.step)
      self.writer.go_back(back)
      self.writer.write(back + 1, {'rollback/spike_step': spike.step, 'rollback/data_offset': int(train_state.data_offset)})

  def finish(self, train_state: state.TrainState) -> evaluate.Score:
    """The whole val split's score."""
    done = int(train_state.step)
    if self.final_score is None:
      self.final_score = self.score_val(train_state.params, self.parts.val)
      self.report(done, self.final_score, write=not self.writer.has(done, 'val/loss'))
    return self.final_score

  def start(self) -> tuple[state.TrainState, int]:
    """The state to go on from and its step; writes the workdir's configuration."""
    parts, first = self.parts, self.parts.stored_step
    if first is None:
      train_state, self.fresh = self.fresh, None  # the step donates it
    else:
      train_state = self.kept.restore(first, checkpoints.with_shardings(parts.abstract, parts.shardings))
      self.kept.set_aside_after(first)
      progress.say(f'going on from step {first} of {self.directory}')
    workdir.write_config(self.directory, parts.experiment, parts.tokenizer)
    self.about = {
      'experiment': experiment_lib.to_json(parts.experiment),
      'tokenizer': workdir.tokenizer_files(parts.tokenizer),
      'tokenizer_sha256': parts.tokenizer.fingerprint(),
      'fingerprint': parts.fingerprint,
    }
    for line in parts.changes:
      progress.say(f'changed on resume: {line}')
    progress.say(progress.parameter_table(parts.abstract.params))
    if processes.count() > 1:
      progress.say(f'{processes.count()} processes, {jax.device_count()} devices: {sharding.told(parts.mesh)}')
    if self.config.sample_tokens and not self.can_sample(train_state):
      progress.say('no samples on the way: parameters are split over devices of several processes; sample.py reads them from a checkpoint')
    return train_state, first or 0

  def loop(self, compiled: Any, train_state: state.TrainState, first: int) -> state.TrainState:
    """Trains from step `first` on. Each dispatch, of one step or several, goes out before the numbers of the one before it are read."""
    c = self.config
    asked = experiment_lib.parse_profile_steps(c.profile_steps)
    profiled = range(max(asked.start, first + 1), asked.stop)
    running: collections.deque[tuple[range, step.Sums]] = collections.deque()
    self.watch.begin(train_state)
    self.about['data_jumps'] = [list(jump) for jump in self.watch.jumps]
    with contextlib.ExitStack() as stack:
      self.bar = stack.enter_context(contextlib.closing(progress.Progress(first, c.num_steps)))
      ends = {profiled.start - 1, profiled.stop - 1}
      spans = step.spans(first, c.num_steps, c.steps_per_dispatch, lambda done: done in ends or self.pause_due(done))
      ahead = stack.enter_context(contextlib.closing(prefetch.prefetch(lambda span: (span, self.watch.inputs(span)), spans)))
      trace = stack.enter_context(contextlib.ExitStack())
      # On the host: a subtraction of arrays would be compiled.
      self.skipped = int(train_state.step) - int(train_state.updates) - int(train_state.health.spiked_steps)
      self.logged_at = self.read_at = time.monotonic()
      self.logged_step = first
      self.stop.hold()
      for span, inputs in ahead:
        done = span[-1]
        if profiled and span[0] == profiled[0] and processes.is_leader():
          jax.block_until_ready(train_state)
          trace.enter_context(jax.profiler.trace(str(self.directory / 'profile')))
        train_state, sums = compiled(train_state, *inputs)
        running.append((span, sums))
        if len(running) > 1:
          # Two dispatches in flight keep the device busy; more would only delay Ctrl-C.
          self.read(*running.popleft(), train_state)
        self.kept.check()
        self.reason = self.lockstep.look(self.own_reason(done))
        self.bar.advance(len(span))
        if profiled and done == profiled[-1]:
          jax.block_until_ready(train_state)
          trace.close()
        if self.reason or done == c.num_steps or self.pause_due(done):
          while running:  # nothing is saved of what a rollback will undo
            self.read(*running.popleft(), train_state)
          self.pause(done, train_state)
    return train_state

  def read(self, span: range, sums: step.Sums, train_state: state.TrainState) -> None:
    """Waits for a dispatch's steps, logs those that are due, and looks at each."""
    c = self.config
    jax.block_until_ready(sums)
    processes.begin_beating()
    began, self.read_at = self.read_at, time.monotonic()
    for done, one in zip(span, step.each(sums, len(span)), strict=True):
      if done % c.log_every_steps == 0 or done == c.num_steps:
        # Steps of one dispatch are done at the same time; each took its share.
        self.log(done, one, began + (self.read_at - began) * (done - span.start + 1) / len(span))
      self.watch.look(done, one, train_state)

  def compiled(self) -> Any:
    """The step as an executable; tells how much memory it takes."""
    assert self.compiling is not None
    compiled, seconds = self.compiling.result()
    processes.meet()  # a collective waits less long for a process that still compiles
    peak, limit = memory.peak_bytes(compiled), memory.limit_bytes()
    told = '' if peak is None else f', {peak / 2**20:,.1f} MiB at its peak on each device'
    progress.say(f'the step is compiled in {seconds:.1f} s{told}')
    if peak and limit and peak > limit:
      progress.say(f'a device has {limit / 2**20:,.1f} MiB, which is less than that peak: {memory.smaller(self.parts)}')
    return compiled

  def evaluates(self, done: int) -> bool:
    every = self.config.eval_every_steps
    return done == self.config.num_steps or (every > 0 and done % every == 0)

  def samples(self, done: int) -> bool:
    c = self.config
    due = self.evaluates(done) if c.sample_every_steps < 0 else c.sample_every_steps > 0 and done % c.sample_every_steps == 0
    return due and c.sample_tokens > 0

  def can_sample(self, train_state: state.TrainState) -> bool:
    """Whether a process has all parameters: the leader samples alone."""
    return all(map(sharding.is_local, jax.tree.leaves(train_state.params)))

  def pause_due(self, done: int) -> bool:
    every = self.config.checkpoint_every_steps
    return self.evaluates(done) or self.samples(done) or (every > 0 and done % every == 0)

  def saved(self, done: int) -> str:
    return f'step {done} is saved in {self.directory}; the same command goes on from there'

  def own_reason(self, done: int) -> tuple[int, str] | None:
    """Why this process would end the run after step `done`, if it would: the exit code and the cause."""
    if number := self.stop.number:
      return 128 + number, signal.Signals(number).name
    minutes = self.parts.experiment.time_limit_minutes
    # Clocks differ: one process decides for all.
    if minutes and processes.is_leader() and time.monotonic() - self.began >= 60 * minutes and done < self.config.num_steps:
      return errors.TimeIsUp.exit_code, f'time_limit_minutes={minutes} have passed'
    return None

  def pause(self, done: int, train_state: state.TrainState) -> None:
    """A checkpoint, then evaluation and samples where they are due; a signal ends those at once, and loses nothing."""
    began = time.monotonic()
    processes.from_leader(self.check_stands)
    self.kept.save(done, train_state, self.about)
    self.writer.flush()
    self.stop.release(self.saved(done), self.settle)
    # A signal that came before the release has left it to us.
    if reason := self.reason or self.own_reason(done):
      if self.reason or processes.count() == 1:
        self.kept.wait()
      else:  # the others are elsewhere, and deleting is done by all
        self.kept.settle()
      code, cause = reason
      raise processes.as_error(code, f'{cause}: {self.saved(done)}')
    if self.evaluates(done):
      self.score_step(done, train_state)
    if self.samples(done) and self.can_sample(train_state):
      processes.from_leader(lambda: self.sample(done, train_state.params))
    if done == self.config.num_steps:
      self.kept.wait()
      processes.from_leader(self.check_stands)
    else:
      self.stop.hold()
    seconds = time.monotonic() - began  # tokens/s is of training alone
    self.logged_at, self.read_at = self.logged_at + seconds, self.read_at + seconds

  def check_stands(self) -> None:
    """A workdir that was deleted would be made anew by the next save, without all that lay there."""
    if not (self.directory / 'config.json').exists():
      raise errors.MachineFailed(f'{self.directory} is gone: it was deleted or moved while the run wrote there')

  def settle(self) -> None:
    self.kept.settle()
    self.writer.flush()

  def score_step(self, done: int, train_state: state.TrainState) -> None:
    score = self.score_val(train_state.params, self.parts.val_prefix)
    self.report(done, score)
    self.final_score = score if done == self.config.num_steps and self.is_whole(score) else None
    self.kept.score(done, score.loss_nats)

  def log(self, done: int, sums: step.Sums, now: float) -> None:
    values = step.means(sums)
    steps, seconds = done - self.logged_step, now - self.logged_at
    tokens_per_s = steps * self.config.batch_size * self.config.sequence_length / max(seconds, 1e-9)
    mfu = None if self.peak_flops is None else tokens_per_s * self.flops_per_token / self.peak_flops
    del values['skipped_in_a_row']
    skipped, spiked = int(values.pop('skipped_steps')), int(values.pop('spiked_steps'))
    if skipped > self.skipped:
      progress.say(f'step {done}: {skipped} steps so far were skipped, their loss or gradient was not finite')
    record = {f'train/{name}': metrics.jsonable(value) for name, value in values.items()}
    record |= {'train/tokens_per_s': tokens_per_s, 'train/skipped_steps': skipped, 'train/spiked_steps': spiked}
    record |= {} if mfu is None else {'train/mfu': mfu}
    self.writer.write(done, record)
    self.bar.log(done, values['loss'], tokens_per_s, mfu)
    self.logged_at, self.logged_step, self.skipped = now, done, skipped

  def score_val(self, params: Any, split: tokens.Split) -> evaluate.Score:
    with memory.explained('a smaller training.eval_batch_size would need less'):
      return self.parts.score(params, split)

  def is_whole(self, score: evaluate.Score) -> bool:
    return score.tokens == self.parts.val.documents['tokens'].sum()

  def report(self, done: int, score: evaluate.Score, write: bool = True) -> None:
    values = {'loss': score.loss_nats, 'bits_per_byte': score.bits_per_byte, 'perplexity': score.perplexity, 'tokens': score.tokens}
    bits = 'no bits per byte' if score.bits_per_byte is None else f'{score.bits_per_byte:.4f} bits per byte'
    whole = self.is_whole(score)
    if write:
      self.writer.write(done, {f'val{"" if whole else "_prefix"}/{name}': metrics.jsonable(value) for name, value in values.items()})
    progress.say(
      f'step {done}  val loss {score.loss_nats:.4f} nats  {bits}  perplexity {score.perplexity:.3f}'
      f'  ({"whole split" if whole else "its beginning"}, {score.tokens:,} tokens)'
    )

  def sample(self, done: int, params: Any) -> None:
    """Writes one sample a temperature to the screen and to TensorBoard."""
    c = self.config
    settings = [
      SamplingParams(
        temperature=t, max_new_tokens=c.sample_tokens, seed=self.parts.experiment.seed, begins_document=c.mask_documents
      )
      for t in c.sample_temperatures
    ]
    prompts = [c.sample_prompt] * len(settings)
    for one, completion in zip(
      settings, generate.generate(self.parts.free_model, sharding.one_copy(params), self.parts.tokenizer, prompts, settings), strict=True
    ):
      text = completion.prompt + completion.text
      progress.say(f'--- step {done}, temperature {one.temperature} ---\n{text}')
      self.writer.text(done, f'sample/temperature_{one.temperature}', text)
