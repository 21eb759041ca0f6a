"""An experiment's parts, checked and built: all that a run needs before it writes anything."""

import concurrent.futures
import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from textgen_jax import errors, program, sharding, trees, workdir
from textgen_jax import experiment as experiment_lib
from textgen_jax.data import prepare, tokens, windows
from textgen_jax.training import checkpoints, evaluate, state, step


class Parts(program.Program):
  """What stays the same while a run trains: the program, the text and the tokenizer.

  Args:
    experiment: what to train; it isn't changed.
    directory: the workdir, which need not exist; None: nothing is kept of the run.
    hook: adds terms to the loss.

  Raises:
    UserError: something doesn't fit: a value, the text, the devices, or what the workdir holds.
  """

  def __init__(self, experiment: experiment_lib.Experiment, directory: pathlib.Path | None, hook: step.LossHook):
    experiment_lib.check(experiment)
    for path in (directory, *directory.parents) if directory else ():
      if path.exists() and not path.is_dir():
        raise errors.UserError(f'workdir={str(directory)!r}: {path} is a file')
    self.directory = directory
    # The step to go on from and what it says of itself; None: a fresh start.
    newest = workdir.newest(directory) if directory else None
    self.stored_step = None if newest is None else newest[0]
    self.stored = None if newest is None else newest[1]
    stored, self.stored_fingerprint = None, ''
    if self.stored is not None:
      stored, self.stored_fingerprint = workdir.described(self.stored, f'{directory}/checkpoints/{self.stored_step}')
    self.experiment, self.changes = reconcile(experiment, stored, directory)
    mesh = sharding.make_mesh(self.experiment.sharding)
    program.check_rows(self.experiment, mesh)  # before the text is read, which may take long
    self._read_text()
    super().__init__(self.experiment, self.tokenizer.vocab_size, mesh, hook)
    self.rows = sharding.own_rows(self.batch_sharding, self.experiment.training.batch_size)  # of each batch, that are read here

  def _read_text(self) -> None:
    e, c = self.experiment, self.experiment.training
    prepared = prepare.prepare(e.data, e.tokenizer)
    self.tokenizer, self.val = prepared.tokenizer, prepared.splits['val']
    self._check_tokenizer()
    self.end_of_text = prepared.tokenizer.special_ids['end_of_text'] if c.mask_documents else None
    how = (prepared.splits['train'], e.seed, c.batch_size, c.sequence_length, self.end_of_text)
    if c.windows == 'contiguous':
      self.windows: windows.Reader = windows.ContiguousStreams(*how, c.reset_probability)
    else:
      self.windows = windows.RandomWindows(*how) if c.windows == 'random' else windows.ShuffledWindows(*how)
    is_reply = prepared.splits['train'].is_reply
    if is_reply is not None and is_reply[1:].all():
      raise errors.UserError(f'data.loss_on_replies=True: {prepared.description["corpus"]} marks nothing as what is answered')
    if not self.val.documents['tokens'].sum():
      raise errors.UserError('the val split has no token to score: data.val_fraction leaves too little, or data.loss_on_replies no reply')
    self.val_prefix = tokens.prefix(self.val, c.eval_max_tokens or len(self.val.tokens))
    if not self.val_prefix.documents['tokens'].sum():
      raise errors.UserError(f'training.eval_max_tokens={c.eval_max_tokens} tokens of val hold no reply to score: take more, or 0 for all')
    try:
      self.tokenizer.encode(c.sample_prompt)
    except errors.UserError as error:
      raise errors.UserError(f'training.sample_prompt={c.sample_prompt!r}: {error}') from error
    self.fingerprint = prepared.fingerprint
    if self.stored_fingerprint and self.stored_fingerprint != self.fingerprint:
      change = f'fingerprint {self.stored_fingerprint[:12]} -> {self.fingerprint[:12]}'
      raise errors.UserError(f'workdir={str(self.directory)!r} was trained on other text: data {change}')

  def _check_tokenizer(self) -> None:
    """A run goes on with the tokenizer that its ids are of."""
    ours = self.tokenizer.fingerprint()
    if self.stored and self.stored.get('tokenizer_sha256') != ours:
      theirs = str(self.stored.get('tokenizer_sha256'))
      raise errors.UserError(
        f"workdir={str(self.directory)!r}: its checkpoint's tokenizer has SHA-256 {theirs[:12]}, and this text's has {ours[:12]}"
      )

  def start_compiling(self) -> 'concurrent.futures.Future[tuple[Any, float]]':
    """The step as an executable, and the seconds from its trace on.

    XLA holds no lock of Python's: while it compiles, or reads what it has compiled, the caller imports and reads what else
    a start needs. That is 0.2 s of a start of 3.
    """
    began = time.monotonic()
    lowered = self.step.lower(checkpoints.with_shardings(self.abstract, self.shardings), *self.inputs([0]))
    xla = concurrent.futures.ThreadPoolExecutor(1, 'xla')
    compiling = xla.submit(lambda: (lowered.compile(), time.monotonic() - began))
    xla.shutdown(wait=False)
    return compiling

  def fresh(self) -> state.TrainState:
    """The state before the first step: from the seed, with the params of `init_from` where that names a run."""
    params = self.warm_params() if self.experiment.init_from else None
    train_state = self.init()
    if params is None:
      return train_state
    opt_state = jax.jit(self.tx.init, out_shardings=self.shardings.opt_state)(params)
    trained = None if train_state.trained is None else jax.tree.map(jnp.copy, params)
    return dataclasses.replace(train_state, params=params, trained=trained, opt_state=opt_state)

  def warm_params(self) -> Any:
    """Another run's params, laid out as this one's."""
    source = self.experiment.init_from
    try:
      other = workdir.load(source)
    except errors.RunError as error:
      raise errors.UserError(f'init_from={source!r}: {error}') from error
    if other.tokenizer.fingerprint() != self.tokenizer.fingerprint():
      raise errors.UserError(f'init_from={source!r} was trained with another tokenizer than this text gets')
    ours, theirs = ({name: leaf.shape for name, leaf in trees.named_leaves(p)} for p in (self.abstract.params, other.params))
    wrong = [f'{n} {theirs.get(n)} -> {ours.get(n)}' for n in {**ours, **theirs} if ours.get(n) != theirs.get(n)]
    if wrong:
      raise errors.UserError(f'init_from={source!r} has other parameters: {"; ".join(wrong[:5])}')
    return sharding.place(other.params, self.shardings.params)

  def batch(self, index: int) -> Any:
    """The batch at place `index` of the data, on the devices: the step's number from 0, and the state's `data_offset`."""
    return self._put_rows(self.windows.batch(index, self.rows), self.batch_sharding)

  def inputs(self, places: Sequence[int]) -> tuple[Any, ...]:
    """What `step` takes beside the state, on the devices, to train on the batches at `places`: at most `steps_per_dispatch` of them."""
    most = self.experiment.training.steps_per_dispatch
    if most == 1:
      (place,) = places
      return (self.batch(place),)
    batches = [self.windows.batch(place, self.rows) for place in places]
    batches += batches[-1:] * (most - len(batches))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    count = sharding.place(np.int32(len(places)), sharding.replicated(self.mesh))
    return self._put_rows(stacked, sharding.stacked(self.batch_sharding), axis=1), count

  def _put_rows(self, batch: Any, where: Any, axis: int = 0) -> Any:
    return sharding.place_rows(batch, where, self.experiment.training.batch_size, self.rows.start, axis)

  def put(self, batch: Any) -> Any:
    """Rows that this process has all of, on the devices."""
    return sharding.place(batch, self.batch_sharding)

  def score(self, params: Any, split: tokens.Split) -> evaluate.Score:
    """The score of the val split, or of its beginning."""
    c = self.experiment.training
    return evaluate.evaluate(
      self.model,
      params,
      split,
      evaluate.Reading(length=c.sequence_length, carried=c.windows == 'contiguous', end_of_text=self.end_of_text),
      standardizes=self.tokenizer.standardizes,
      batch_size=-(-c.eval_batch_size // self.row_ways) * self.row_ways,
      divisor=self.row_ways,
      put=self.put,
    )


def reconcile(
  given: experiment_lib.Experiment, stored: experiment_lib.Experiment | None, directory: pathlib.Path | None
) -> tuple[experiment_lib.Experiment, list[str]]:
  """What to run: `given`, resolved; and how it differs from `stored`, in fields that may change on resume."""
  if stored is None:
    return experiment_lib.resolve(given), []
  resolved = experiment_lib.resolve(given)
  if not given.optimizer.schedule_steps:
    resolved.optimizer.schedule_steps = stored.optimizer.schedule_steps
  changes = experiment_lib.differences(stored, resolved)
  refused = [f'{name}: {change}' for name, change in changes.items() if name not in experiment_lib.MAY_CHANGE]
  if refused:
    raise errors.UserError(f'workdir={str(directory)!r} was trained with other settings: {"; ".join(refused)}')
  return resolved, [f'{name}: {change}' for name, change in changes.items()]
