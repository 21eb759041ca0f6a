"""The training loop: dispatch, log, evaluate, sample, save.

  from textgen_jax import trainer
  trainer.train(experiment, 'runs/name')
"""

import collections
import contextlib
import copy
import dataclasses
import os
import pathlib
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax

from textgen_jax import errors, sharding, trees, workdir
from textgen_jax import experiment as experiment_lib
from textgen_jax.data import prefetch, prepare, windows
from textgen_jax.models import base, build
from textgen_jax.sampling import generate
from textgen_jax.sampling.params import SamplingParams
from textgen_jax.training import checkpoints, evaluate, metrics, optimizer, progress, state, step


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

  Raises:
    UserError: wrong input; nothing was written to the workdir.
    Diverged: every step between two log lines was skipped.
    Stopped: SIGINT or SIGTERM came; the last finished step is saved.
  """
  with _signals() as stopped:
    return _Run(experiment, pathlib.Path(directory), hook).train(stopped)


class _Run:
  """All that stays the same while a run trains."""

  def __init__(self, experiment: experiment_lib.Experiment, directory: pathlib.Path, hook: step.LossHook):
    experiment_lib.check(experiment)
    self.directory = directory
    stored = workdir.read_config(directory) if workdir.has_checkpoints(directory) else None
    self.experiment, self.changes = reconcile(experiment, stored, directory)
    e = self.experiment
    self.config = c = e.training
    if directory.exists() and not directory.is_dir():
      raise errors.UserError(f'workdir={str(directory)!r} is a file')
    self.mesh = sharding.make_mesh(e.sharding)
    ways = sharding.batch_divisor(e.sharding, self.mesh)
    if c.batch_size // c.accumulation_steps % ways:
      parts = f' / training.accumulation_steps={c.accumulation_steps}' if c.accumulation_steps > 1 else ''
      raise errors.UserError(f"training.batch_size={c.batch_size}{parts} isn't divisible by the {ways} devices that rows are split over")
    self.prepared = prepare.prepare(e.data, e.tokenizer)
    self.tokenizer = self.prepared.tokenizer
    make = windows.ContiguousStreams if c.windows == 'contiguous' else windows.RandomWindows
    self.windows = make(self.prepared.splits['train'], e.seed, c.batch_size, c.sequence_length)
    if len(self.prepared.splits['val']) < 2:
      raise errors.UserError(f'the val split has {len(self.prepared.splits["val"])} tokens: data.val_fraction leaves too little to score')
    generate.prompt_ids(self.tokenizer, c.sample_prompt)
    self.fingerprint = {
      'data': self.prepared.fingerprint,
      'seed': e.seed,
      'batch_size': c.batch_size,
      'sequence_length': c.sequence_length,
      'windows': c.windows,
    }
    constrain = sharding.make_constrain(e.sharding, self.mesh)
    vocab_size = self.tokenizer.vocab_size
    self.model = build.build(e.model, vocab_size, c.sequence_length, constrain)
    # Samples and scores come in batches that the devices may not divide: XLA spreads them as the params lie.
    self.free_model = build.build(e.model, vocab_size, c.sequence_length)
    tx = optimizer.build(e.optimizer)
    carry_rows = c.batch_size if c.windows == 'contiguous' else 0
    self.init, self.abstract, self.shardings = state.create(self.model, tx, e.seed, carry_rows, e.sharding, self.mesh)
    self.batch_sharding = sharding.batch_sharding(e.sharding, self.mesh)
    self.eval_batch_size = -(-c.eval_batch_size // ways) * ways
    self.step = jax.jit(
      step.make_train_step(self.model, tx, optimizer.make_schedule(e.optimizer), c.accumulation_steps, hook),
      donate_argnums=0,
      out_shardings=(self.shardings, None),
    )
    self.byte_lengths = self.tokenizer.byte_lengths()
    self.best = float('inf')  # lowest val loss so far
    self.final_score: evaluate.Score | None = None
    self.skipped: int | None = None  # steps without an update, as last logged

  def train(self, stopped: list[int]) -> evaluate.Score:
    """The loop. Step n is dispatched before step n - 1's numbers are read."""
    c = self.config
    train_state, first = self.start()
    if first >= c.num_steps:
      progress.say(f'{self.directory} has trained {first} steps already; training.num_steps={c.num_steps} asks for no more')
    else:
      train_state = self.loop(train_state, first, stopped)
    if self.final_score is None:
      self.final_score = self.score_val(train_state.params, 0)
      with contextlib.closing(metrics.Writer(self.directory, max(first, c.num_steps))) as self.writer:
        self.report(max(first, c.num_steps), self.final_score, 'whole val split')
    self.kept.close()
    return self.final_score

  def start(self) -> tuple[state.TrainState, int]:
    """The state to go on from and its step; writes the workdir's configuration."""
    restored = workdir.has_checkpoints(self.directory)
    warm_params = self.warm_params() if self.experiment.init_from and not restored else None
    self.kept = checkpoints.Checkpoints(self.directory, self.config.keep_checkpoints)
    latest = self.kept.latest_step()
    if latest is not None:
      found = self.kept.about(latest).get('fingerprint', {})
      changed = [f'{k}: {str(found.get(k))[:12]} -> {str(v)[:12]}' for k, v in self.fingerprint.items() if found.get(k) != v]
      if changed:
        raise errors.UserError(f'workdir={str(self.directory)!r} was trained on other batches: {"; ".join(changed)}')
    for line in self.changes:
      progress.say(f'changed on resume: {line}')
    workdir.write_config(self.directory, self.experiment, self.tokenizer)
    self.about = {
      'experiment': experiment_lib.to_json(self.experiment),
      'tokenizer': checkpoints.read_files(self.directory / 'tokenizer'),
      'fingerprint': self.fingerprint,
    }
    progress.say(progress.parameter_table(self.abstract.params))
    if latest is None:
      train_state = self.init()
      return (train_state if warm_params is None else dataclasses.replace(train_state, params=warm_params)), 0
    train_state = self.kept.restore(latest, checkpoints.with_shardings(self.abstract, self.shardings))
    self.best = min((loss for kept in self.kept.steps() if (loss := self.kept.val_loss(kept)) is not None), default=self.best)
    progress.say(f'going on from step {latest} of {self.directory}')
    return train_state, latest

  def warm_params(self) -> Any:
    """Another run's params, laid out as this one's."""
    other = workdir.load(self.experiment.init_from)
    if other.tokenizer.fingerprint() != self.tokenizer.fingerprint():
      raise errors.UserError(f'init_from={self.experiment.init_from!r} was trained with another tokenizer than this text gets')
    ours = {name: leaf.shape for name, leaf in trees.named_leaves(self.abstract.params)}
    theirs = {name: leaf.shape for name, leaf in trees.named_leaves(other.params)}
    wrong = [f'{n} {theirs.get(n)} -> {ours.get(n)}' for n in {**ours, **theirs} if ours.get(n) != theirs.get(n)]
    if wrong:
      raise errors.UserError(f'init_from={self.experiment.init_from!r} has other parameters: {"; ".join(wrong[:5])}')
    return jax.device_put(other.params, self.shardings.params)

  def batch(self, index: int) -> windows.Batch:
    return jax.device_put(self.windows.batch(index), self.batch_sharding)

  def loop(self, train_state: state.TrainState, first: int, stopped: list[int]) -> state.TrainState:
    c = self.config
    began = time.monotonic()
    compiled = self.step.lower(train_state, self.batch(first)).compile()
    memory = compiled.memory_analysis()
    peak = f', {memory.peak_memory_in_bytes / 2**20:,.0f} MiB at its peak on each device' if memory else ''
    progress.say(f'the step is compiled in {time.monotonic() - began:.1f} s{peak}')
    profiled = experiment_lib.parse_profile_steps(c.profile_steps)
    running: collections.deque[step.Sums] = collections.deque()
    with contextlib.ExitStack() as stack:
      self.writer = stack.enter_context(contextlib.closing(metrics.Writer(self.directory, first)))
      self.bar = stack.enter_context(contextlib.closing(progress.Progress(first, c.num_steps)))
      batches = stack.enter_context(contextlib.closing(prefetch.prefetch(self.batch, first, c.num_steps)))
      self.logged_at, self.logged_step = time.monotonic(), first
      due: tuple[int, step.Sums] | None = None
      for done, batch in enumerate(batches, start=first + 1):
        if done == profiled.start:
          jax.block_until_ready(train_state)
          jax.profiler.start_trace(str(self.directory / 'profile'))
        train_state, sums = compiled(train_state, batch)
        running.append(sums)
        if due:
          self.log(*due)
        due = (done, sums) if done % c.log_every_steps == 0 or done == c.num_steps else None
        if len(running) > 1:
          # Two steps in flight keep the device busy; more would only delay Ctrl-C.
          jax.block_until_ready(running.popleft())
        self.bar.step()
        if profiled and done == profiled[-1]:
          jax.block_until_ready(train_state)
          jax.profiler.stop_trace()
        last = done == c.num_steps or bool(stopped)
        if self.pause_due(done) or last:
          if due:
            self.log(*due)
          due = None
          self.pause(done, train_state, last, bool(stopped))
          if stopped:
            name = signal.Signals(stopped[0]).name
            raise errors.Stopped(f'{name}: step {done} is saved in {self.directory}; the same command goes on from there', stopped[0])
    return train_state

  def pause_due(self, done: int) -> bool:
    c = self.config
    return any(every > 0 and done % every == 0 for every in (c.eval_every_steps, c.checkpoint_every_steps, c.sample_every_steps))

  def pause(self, done: int, train_state: state.TrainState, last: bool, stopped: bool) -> None:
    """Evaluation, samples and a checkpoint, whichever are due after step `done`."""
    c = self.config
    began = time.monotonic()
    val_loss = None
    evaluated = not stopped and ((c.eval_every_steps > 0 and done % c.eval_every_steps == 0) or last)
    if evaluated:
      score = self.score_val(train_state.params, c.eval_max_tokens)
      val_loss = score.loss_nats
      whole = score.tokens == len(self.prepared.splits['val']) - 1
      self.final_score = score if whole and last else None
      self.report(done, score, 'whole val split' if whole else f'first {c.eval_max_tokens:,} tokens of val')
    sampled = evaluated if c.sample_every_steps < 0 else c.sample_every_steps > 0 and done % c.sample_every_steps == 0
    if sampled and not stopped:
      self.sample(done, train_state.params)
    better = val_loss is not None and val_loss < self.best
    if better and val_loss is not None:
      self.best = val_loss
    if better or last or (c.checkpoint_every_steps > 0 and done % c.checkpoint_every_steps == 0):
      self.kept.save(done, train_state, self.about, val_loss)
    if last:
      self.kept.wait()
    self.logged_at += time.monotonic() - began  # tokens/s is of training alone

  def log(self, done: int, sums: step.Sums) -> None:
    values = {name: float(total) / max(float(weight), 1e-30) for name, (total, weight) in jax.device_get(sums).items()}
    now = time.monotonic()
    steps, seconds = done - self.logged_step, now - self.logged_at
    tokens_per_s = steps * self.config.batch_size * self.config.sequence_length / max(seconds, 1e-9)
    peak = metrics.peak_flops()
    flops = base.flops_per_token(self.model, self.abstract.params, self.config.sequence_length)
    mfu = None if peak is None else tokens_per_s * flops / peak
    skipped = int(values.pop('skipped_steps'))
    if steps > 1 and self.skipped is not None and skipped - self.skipped >= steps:
      raise errors.Diverged(f'steps {self.logged_step + 1} to {done}: no loss and gradient was finite, so no update was applied')
    if skipped > (self.skipped or 0):
      progress.say(f'step {done}: {skipped} steps so far were skipped, their loss or gradient was not finite')
    record = {f'train/{name}': metrics.jsonable(value) for name, value in values.items()}
    record |= {'train/tokens_per_s': tokens_per_s, 'train/skipped_steps': skipped} | ({} if mfu is None else {'train/mfu': mfu})
    self.writer.write(done, record)
    self.bar.log(done, values['loss'], tokens_per_s, mfu)
    self.logged_at, self.logged_step, self.skipped = now, done, skipped

  def score_val(self, params: Any, max_tokens: int) -> evaluate.Score:
    """The val split's score: whole, or over a prefix."""
    c = self.config
    tokens = self.prepared.splits['val']
    return evaluate.evaluate(
      self.free_model,
      params,
      tokens[: max_tokens or len(tokens)],
      self.byte_lengths,
      length=c.sequence_length,
      batch_size=self.eval_batch_size,
      put=lambda batch: jax.device_put(batch, self.batch_sharding),
      row_chunks=evaluate.row_chunks(c.windows == 'contiguous', c.sequence_length),
    )

  def report(self, done: int, score: evaluate.Score, what: str) -> None:
    values = {'loss': score.loss_nats, 'bits_per_byte': score.bits_per_byte, 'perplexity': score.perplexity, 'tokens': score.tokens}
    self.writer.write(done, {f'val/{name}': metrics.jsonable(value) for name, value in values.items()})
    progress.say(
      f'step {done}  val loss {score.loss_nats:.4f} nats  {score.bits_per_byte:.4f} bits per byte'
      f'  perplexity {score.perplexity:.3f}  ({what}, {score.tokens:,} tokens)'
    )

  def sample(self, done: int, params: Any) -> None:
    """Writes one sample a temperature to the screen and to TensorBoard."""
    c = self.config
    if not c.sample_tokens:
      return
    settings = [SamplingParams(temperature=t, max_new_tokens=c.sample_tokens, seed=self.experiment.seed) for t in c.sample_temperatures]
    texts = generate.generate(self.free_model, params, self.tokenizer, [c.sample_prompt] * len(settings), settings)
    for one, completion in zip(settings, texts, strict=True):
      text = completion.prompt + completion.text
      progress.say(f'--- step {done}, temperature {one.temperature} ---\n{text}')
      self.writer.text(done, f'sample/temperature_{one.temperature}', text)


def reconcile(
  given: experiment_lib.Experiment, stored: experiment_lib.Experiment | None, directory: pathlib.Path
) -> tuple[experiment_lib.Experiment, list[str]]:
  """What to run: `given`, resolved; and its changes of `stored`, all of which may be made on resume."""
  if stored is None:
    return experiment_lib.resolve(given), []
  given = copy.deepcopy(given)
  given.optimizer.schedule_steps = given.optimizer.schedule_steps or stored.optimizer.schedule_steps
  lines = experiment_lib.differences(stored, given)
  refused = [line for line in lines if line.split(':')[0] not in experiment_lib.MAY_CHANGE]
  if refused:
    raise errors.UserError(f'workdir={str(directory)!r} was trained with other settings: {"; ".join(refused)}')
  return given, lines


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
  """A list that SIGINT and SIGTERM add themselves to; a second one acts at once."""
  caught: list[int] = []

  def catch(number: int, frame: Any) -> None:
    del frame
    if caught:
      signal.signal(number, signal.SIG_DFL)
      signal.raise_signal(number)
    caught.append(number)
    progress.say('stopping after this step; a second signal leaves at once')

  try:
    previous = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
  except ValueError:  # not the main thread: whoever owns that one handles signals
    previous = {}
  try:
    yield caught
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
