"""Checkpoints that know whether they are whole: params apart from the rest, with what is needed to read them."""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import re
import shutil
from typing import Any

import jax
import numpy as np

from textgen_jax import errors, processes, trees
from textgen_jax.training import integrity, noise, progress, state

FORMAT = 3  # counts changes to what a checkpoint holds
TO_SAMPLE = ('params', 'about')
TO_TRAIN = ('params', 'state', 'about')
ABOUT_FILE = 'about/metadata'  # as orbax names it
SCORE = 'score.json'  # in a step's folder, written when the step was evaluated: after its manifest
SAVE_S = 3600  # after which a save has failed: several processes wait no longer for each other's files
STRAGGLERS_S = 5.0  # to wait for what still writes after a save has failed
_COUNTER = itertools.count()  # of the process's Checkpoints: alike in all processes
LEFTOVERS = ('*.orbax-checkpoint-tmp*', '*.deleted')  # of a process that was killed while it saved or deleted


class Checkpoints:
  """A workdir's `checkpoints/`: the latest ones, the best by val loss, and every `keep_every`-th are kept.

  With `keep_behind` also the newest that is so many steps older than the latest, which a rollback goes back to, and those after it.

  Each step holds `params`, `state` (the rest of `TrainState`), `about` (JSON: the experiment, the tokenizer's files, the
  fingerprint of what the batches are made of, every leaf's shape and dtype) and the manifest of their files, committed by one
  rename. A step is read only where it is as it was written.

  Several processes save and read together, in one folder that all of them see. Each measures the files that it has written, and looks at
  its share of those that are to be read; the leader alone deletes.
  """

  def __init__(self, workdir: pathlib.Path, keep_latest: int = 1, keep_every: int = 0, keep_behind: int = 0, read_only: bool = False):
    self._directory = workdir.absolute() / 'checkpoints'
    self._keep_latest, self._keep_every, self._keep_behind = keep_latest, keep_every, keep_behind
    self._saving: int | None = None  # the step that is on its way to the disk
    self._begun: int | None = None  # the last one that was
    self._failure = ''  # of the last save; orbax tells each of its threads' by itself
    self._problems: dict[tuple[int, tuple[str, ...]], str | None] = {}  # what was looked at already
    self._name = f'{self._directory}#{next(_COUNTER)}'  # which no other has
    self._saves = 0  # begun by this process
    if not read_only:
      _ = self._checkpointer  # orbax is imported while XLA reads the compiled step
      processes.from_leader(self._begin)

  @functools.cached_property
  def _checkpointer(self) -> Any:
    """Made where arrays are read: it settles JAX's devices, which a reader of `about` may yet have to choose."""
    ocp = _orbax()
    handlers = {'params': ocp.StandardCheckpointHandler(), 'state': ocp.StandardCheckpointHandler(), 'about': ocp.JsonCheckpointHandler()}
    noise.hush()
    # Orbax's CheckpointManager isn't used: it lists steps that aren't committed, and takes an empty folder or a link for one.
    return ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(**handlers),
      # Called on the complete folder before the rename that commits it, without arguments.
      async_options=ocp.options.AsyncOptions(timeout_secs=SAVE_S, post_finalization_callback=self._seal, barrier_sync_fn=self._meet),
    )

  def _begin(self) -> None:
    self._directory.mkdir(parents=True, exist_ok=True)
    self._clear()

  def save(self, step: int, train_state: state.TrainState, about: dict[str, Any]) -> None:
    """Begins to save in the background; raises what an earlier save failed with. A step that is there already is kept."""
    self.wait()
    if processes.from_leader((self._directory / str(step)).exists):
      return
    args = _orbax().args
    items = {'params': train_state.params, 'state': rest(train_state)}
    self._saving = self._begun = step
    self._saves += 1
    self._failure = ''
    try:
      self._checkpointer.save(
        self._directory / str(step),
        args=args.Composite(
          params=args.StandardSave(items['params']),
          state=args.StandardSave(items['state']),
          about=args.JsonSave({'format': FORMAT, **about, 'leaves': _describe(items)}),
        ),
      )
    except Exception as error:  # as in settle
      raise self._failed(error) from error

  def _meet(self, *, key: str, timeout_ms: int) -> None:
    """Orbax's barrier, in a thread of its own. Once all files are written each process measures its own, which memory may still hold."""
    _orbax().multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)
    if 'async_write_complete' in key:
      own = integrity.measured(self._folder(), f'*/ocdbt.process_{processes.index()}/**/*')
      processes.tell(f'{self._name}/{self._saves}', own)

  def _seal(self) -> None:
    known: integrity.Measures = {}
    for of_one in processes.told(f'{self._name}/{self._saves}') if processes.count() > 1 else ():
      known |= of_one
    integrity.seal(self._folder(), str(self._saving), known)

  def _folder(self) -> pathlib.Path:
    (folder,) = self._directory.glob(f'{self._saving}.orbax-checkpoint-tmp*')
    return folder

  def check(self) -> None:
    """Raises what a save in the background failed with."""
    try:
      self._checkpointer.check_for_errors()
    except Exception as error:  # as in settle
      raise self._failed(error) from error

  def settle(self) -> None:
    """Until what was begun is on disk; raises what the save failed with. Any thread may wait."""
    try:
      with processes.resting():
        self._checkpointer.wait_until_finished()
    except Exception as error:  # orbax raises nearly anything
      raise self._failed(error) from error

  def wait(self) -> None:
    """As `settle`, and deletes what needn't be kept."""
    self.settle()
    if self._saving is not None:
      self._saving = None
      processes.from_leader(self._prune)

  def _failed(self, error: Exception) -> errors.MachineFailed:
    self._saving = None
    noise.wait_for_stragglers(STRAGGLERS_S)
    if processes.is_leader():
      self._clear()  # what is half written would only fill the disk
    self._failure = self._failure or f'{self._directory}/{self._begun}: the checkpoint could not be saved: {_why(error)}'
    return errors.MachineFailed(self._failure)

  def close(self) -> None:
    if '_checkpointer' not in vars(self):  # nothing was saved or restored
      return
    if processes.count() == 1:
      self.wait()
    else:  # the others may be elsewhere, and deleting is done by all
      self.settle()
    self._checkpointer.close()

  def score(self, step: int, val_loss: float) -> None:
    """Writes down what a saved step scored; the best so far is kept."""
    self.wait()
    processes.from_leader(lambda: self._write_score(step, val_loss))

  def _write_score(self, step: int, val_loss: float) -> None:
    folder = self._directory / str(step)
    if folder.is_dir():
      integrity.write_sealed(folder / SCORE, {'step': step, 'val_loss': val_loss if np.isfinite(val_loss) else None})
      self._prune()

  def is_scored(self, step: int) -> bool:
    return processes.from_leader(lambda: self._read_score(step) is not None)

  def val_loss(self, step: int) -> float | None:
    """Of a step that was evaluated; None where it wasn't, or where the loss isn't finite."""
    return (self._read_score(step) or {}).get('val_loss')

  def _read_score(self, step: int) -> dict[str, Any] | None:
    path = self._directory / str(step) / SCORE
    try:
      score = integrity.read_sealed(path)
    except FileNotFoundError:
      return None
    except (OSError, ValueError) as error:
      progress.say(f'{path} is damaged ({error}): the step counts as one that was never evaluated')
      return None
    return score if isinstance(score, dict) and score.get('step') == step else None

  def steps(self) -> list[int]:
    """Those that have a folder, whole or not."""
    return listed(self._directory)

  def best_steps(self) -> list[int]:
    """Steps that were scored, the lowest val loss first, the later of two equals before the other."""
    scored = [(loss, -step) for step in self.steps() if (loss := self.val_loss(step)) is not None]
    return [-step for _, step in sorted(scored)]

  def problem(self, step: int, items: tuple[str, ...] = TO_TRAIN) -> str | None:
    """Why a step can't be used; None where it can."""
    if (step, items) not in self._problems:
      whole = self._problems.get((step, TO_TRAIN), 'not looked at') is None
      self._problems[step, items] = None if whole else self._look(step, items)
    return self._problems[step, items]

  def _look(self, step: int, items: tuple[str, ...]) -> str | None:
    shares = processes.everyone(integrity.problem(self._directory / str(step), items, processes.sharers()))
    found = next(filter(None, shares), None)
    if found is None and (version := self._read_about(step).get('format')) != FORMAT:
      return f'it is of format {version}, and this version reads {FORMAT}'
    return found

  def first_good(self, steps: list[int], items: tuple[str, ...] = TO_TRAIN) -> int | None:
    """The first that is whole; those before it are named."""
    steps = processes.from_leader(lambda: steps)
    for step in steps:
      found = self.problem(step, items)
      if found is None:
        return step
      progress.say(f'{self._directory}/{step} is skipped: {found}')
    return None

  def newest_good(self, items: tuple[str, ...] = TO_TRAIN) -> int | None:
    """The newest step that is whole; None where there is no step.

    Raises:
      NoGoodCheckpoint: there are steps, and none is whole.
    """
    steps = processes.from_leader(self.steps)[::-1]
    step = self.first_good(steps, items)
    if step is None and steps:
      why = f'{steps[0]}: {self.problem(steps[0], items)}'
      raise errors.NoGoodCheckpoint(f'{self._directory}: none of its {len(steps)} checkpoints is good; {why}')
    return step

  def forget_after(self, step: int) -> None:
    """Deletes every later step: the run takes them anew."""
    self.wait()
    processes.from_leader(lambda: self._delete_after(step))

  def _delete_after(self, step: int) -> None:
    for later in self.steps():
      if later > step:
        self._delete(later)

  def set_aside_after(self, step: int) -> None:
    """Renames whatever bears a later step's number: it can't be used, and would be in the way of that step's save."""
    processes.from_leader(lambda: self._set_aside_after(step))

  def _set_aside_after(self, step: int) -> None:
    for path in self._directory.iterdir():
      if _is_step(path.name) and int(path.name) > step:
        aside = path.with_name(f'{path.name}.damaged')
        _remove(aside)
        path.rename(aside)
        progress.say(f'{path} was set aside as {aside.name}')

  def _prune(self) -> None:
    steps = self.steps()
    keep = {*steps[-self._keep_latest :], *self.best_steps()[:1], *(s for s in steps if self._keep_every and s % self._keep_every == 0)}
    if self._keep_behind:
      first = max((s for s in steps if s <= steps[-1] - self._keep_behind), default=0)
      keep |= {s for s in steps if s >= first}
    for step in steps:
      if step not in keep:
        self._delete(step)

  def _delete(self, step: int) -> None:
    # Renamed first: a process that is killed in between leaves no folder that could be taken for a step.
    self._problems = {key: found for key, found in self._problems.items() if key[0] != step}
    doomed = self._directory / f'{step}.deleted'
    (self._directory / str(step)).rename(doomed)
    _remove(doomed)

  def _clear(self) -> None:
    for pattern in LEFTOVERS:
      for path in self._directory.glob(pattern):
        _remove(path)

  def about(self, step: int) -> dict[str, Any]:
    if found := self.problem(step, TO_SAMPLE):
      raise errors.NoGoodCheckpoint(f'{self._directory}/{step}: {found}')
    return self._read_about(step)

  def _read_about(self, step: int) -> dict[str, Any]:
    # Not by orbax, which would have all processes meet, and a process that only looks wait for its import.
    try:
      about = json.loads((self._directory / str(step) / ABOUT_FILE).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
      raise errors.NoGoodCheckpoint(f'{self._directory}/{step}: the checkpoint could not be read: {first_line(error)}') from error
    return about if isinstance(about, dict) else {}

  def restore(self, step: int, abstract: state.TrainState) -> state.TrainState:
    """The state at `step`, laid out as `abstract`'s shardings say."""
    items = self._restore_arrays(step, {'params': abstract.params, 'state': rest(abstract)})
    return dataclasses.replace(abstract, params=items['params'], **items['state'])

  def restore_params(self, step: int, abstract_params: Any) -> Any:
    return self._restore_arrays(step, {'params': abstract_params})['params']

  def _restore_arrays(self, step: int, abstract: dict[str, Any]) -> Any:
    """Orbax would cast another dtype without a word, and tell of other shapes on pages: what there is is compared first."""
    about = self._read_about(step).get('leaves')
    stored = {name: leaf for name, leaf in (about or {}).items() if name.partition('/')[0] in abstract}
    wanted = _describe(abstract)
    wrong = [name for name in {**stored, **wanted} if stored.get(name) != wanted.get(name)]
    if wrong:
      lines = [f'{name}: {_text(stored.get(name))} -> {_text(wanted.get(name))}' for name in wrong]
      told = '\n'.join(lines if len(lines) <= 9 else [*lines[:8], f'and {len(lines) - 8} more'])
      raise errors.NoGoodCheckpoint(f'{self._directory}/{step} holds other arrays than this run has:\n{told}')
    return self._restore(step, **{name: _orbax().args.StandardRestore(tree) for name, tree in abstract.items()})

  def _restore(self, step: int, **args: Any) -> Any:
    try:
      return self._checkpointer.restore(self._directory / str(step), args=_orbax().args.Composite(**args))
    except Exception as error:  # orbax raises nearly anything on damaged files
      # Where processes have found it whole together, it is the machine that fails one of them.
      kind = errors.NoGoodCheckpoint if processes.count() == 1 else errors.MachineFailed
      raise kind(f'{self._directory}/{step}: the checkpoint could not be read: {first_line(error)}') from error


def _orbax() -> Any:
  """Not imported with this module: it takes 0.2 s, which a run has while XLA reads the compiled step."""
  import orbax.checkpoint

  return orbax.checkpoint


def listed(directory: pathlib.Path) -> list[int]:
  """The steps in a `checkpoints/`, ascending: folders, no links, that bear a plain number."""
  paths = directory.iterdir() if directory.is_dir() else ()
  return sorted(int(path.name) for path in paths if _is_step(path.name) and path.is_dir() and not path.is_symlink())


def _is_step(name: str) -> bool:
  return re.fullmatch('0|[1-9][0-9]{0,17}', name) is not None


def _remove(path: pathlib.Path) -> None:
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path, ignore_errors=True)
  else:
    path.unlink(missing_ok=True)


def _describe(items: dict[str, Any]) -> dict[str, list[Any]]:
  """Each array's dtype and shape, by name."""
  return {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in trees.named_leaves(items)}


def _text(leaf: list[Any] | None) -> str:
  return 'none' if leaf is None else f'{leaf[0]} {tuple(leaf[1])}'


def rest(train_state: state.TrainState) -> dict[str, Any]:
  """All of the state but its params; a carry of None has no place in the tree."""
  values = {field.name: getattr(train_state, field.name) for field in dataclasses.fields(train_state)}
  return {name: value for name, value in values.items() if name != 'params' and value is not None}


def with_shardings(abstract: Any, shardings: Any) -> Any:
  """Shapes and dtypes that also say where each array goes."""
  return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)


def _why(error: Exception) -> str:
  """Tensorstore tells the system's reason last, after several paths."""
  found = re.search(r"os_error_code='(\d+)'", str(error))
  return os.strerror(int(found[1])) if found else getattr(error, 'strerror', None) or first_line(error)[:100]


def first_line(error: BaseException) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
