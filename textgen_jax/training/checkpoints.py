"""Checkpoints: params apart from the rest, with what is needed to read them."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from textgen_jax import errors
from textgen_jax.training import state

FORMAT = 2  # counts changes to what a checkpoint holds


def _score(metrics: dict[str, float] | None) -> float:
  """Higher is better; a step without a finite loss is the worst, or a NaN would evict the best."""
  loss = (metrics or {}).get('val_loss')
  return -loss if loss is not None and np.isfinite(loss) else float('-inf')


class Checkpoints:
  """A workdir's `checkpoints/`: the latest ones and the best by val loss are kept.

  Each step holds `params`, `state` (the rest of `TrainState`), and `about` (JSON:
  the experiment, the tokenizer's files, the fingerprint of what the batches are made of).
  """

  def __init__(self, workdir: pathlib.Path, keep_latest: int = 1, read_only: bool = False):
    self._directory = workdir.absolute() / 'checkpoints'
    managers = ocp.checkpoint_managers
    options = ocp.CheckpointManagerOptions(
      create=not read_only,
      read_only=read_only,
      preservation_policy=managers.AnyPreservationPolicy(
        [
          managers.LatestN(keep_latest),
          # A step whose record is missing is what a process left that was killed while it deleted.
          managers.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False),
        ]
      ),
      best_fn=_score,
      best_mode='max',
      cleanup_tmp_directories=not read_only,
    )
    handlers = {
      'params': ocp.StandardCheckpointHandler(),
      'state': ocp.StandardCheckpointHandler(),
      'about': ocp.JsonCheckpointHandler(),
    }
    try:
      self._manager = ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)
    except ValueError as error:  # a step's metrics that are no JSON
      raise errors.NoGoodCheckpoint(f'{self._directory}: the checkpoints could not be listed: {first_line(error)}') from error

  def save(self, step: int, train_state: state.TrainState, about: dict[str, Any], val_loss: float | None) -> None:
    """Begins to save in the background; raises what an earlier save failed with."""
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          params=ocp.args.StandardSave(train_state.params),
          state=ocp.args.StandardSave(rest(train_state)),
          about=ocp.args.JsonSave({'format': FORMAT, **about}),
        ),
        metrics={} if val_loss is None else {'val_loss': val_loss},
      )
    except (OSError, ValueError) as error:
      raise errors.MachineFailed(f'{self._directory}/{step}: the checkpoint could not be saved: {first_line(error)}') from error

  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """The step with the lowest val loss; None where no step was scored."""
    scored = [(loss, -step) for step in self.steps() if (loss := self.val_loss(step)) is not None]
    return -min(scored)[1] if scored else None

  def val_loss(self, step: int) -> float | None:
    """What the step's whole record says; None where it wasn't evaluated."""
    try:
      metrics = self._manager.metrics(step)
    except Exception as error:  # as in _restore
      raise self._unreadable(step, error) from error
    loss = (metrics or {}).get('val_loss')
    return loss if loss is not None and np.isfinite(loss) else None

  def about(self, step: int) -> dict[str, Any]:
    about = self._restore(step, about=ocp.args.JsonRestore())['about']
    if not isinstance(about, dict) or about.get('format') != FORMAT:
      raise errors.NoGoodCheckpoint(f'{self._directory}/{step} is not of format {FORMAT}, which this version reads')
    return about

  def restore(self, step: int, abstract: state.TrainState) -> state.TrainState:
    """The state at `step`, laid out as `abstract`'s shardings say."""
    items = self._restore(
      step, params=ocp.args.StandardRestore(abstract.params), state=ocp.args.StandardRestore(rest(abstract))
    )
    return dataclasses.replace(abstract, params=items['params'], **items['state'])

  def restore_params(self, step: int, abstract_params: Any) -> Any:
    return self._restore(step, params=ocp.args.StandardRestore(abstract_params))['params']

  def _restore(self, step: int, **args: Any) -> Any:
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**args))
    except Exception as error:  # orbax raises nearly anything on damaged files
      raise self._unreadable(step, error) from error

  def _unreadable(self, step: int, error: Exception) -> errors.NoGoodCheckpoint:
    return errors.NoGoodCheckpoint(f'{self._directory}/{step}: the checkpoint could not be read: {first_line(error)}')

  def wait(self) -> None:
    """Until what was begun is on disk; raises what it failed with."""
    try:
      self._manager.wait_until_finished()
    except (OSError, ValueError) as error:
      raise errors.MachineFailed(f'{self._directory}: a checkpoint could not be saved: {first_line(error)}') from error

  def close(self) -> None:
    self.wait()
    self._manager.close()


def rest(train_state: state.TrainState) -> dict[str, Any]:
  """All of the state but its params; a carry of None has no place in the tree."""
  values = {field.name: getattr(train_state, field.name) for field in dataclasses.fields(train_state)}
  return {name: value for name, value in values.items() if name != 'params' and value is not None}


def with_shardings(abstract: Any, shardings: Any) -> Any:
  """Shapes and dtypes that also say where each array goes."""
  return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)


def read_files(directory: pathlib.Path) -> dict[str, Any]:
  """A tokenizer's JSON files by name, as they go into a checkpoint."""
  return {path.name: json.loads(path.read_text(encoding='utf-8')) for path in sorted(directory.glob('*.json'))}


def write_files(directory: pathlib.Path, files: dict[str, Any]) -> None:
  """The reverse of `read_files`."""
  directory.mkdir(parents=True, exist_ok=True)
  for name, content in files.items():
    if pathlib.PurePath(name).name != name:
      raise errors.NoGoodCheckpoint(f'{directory}: a checkpoint names the file {name!r}, which lies elsewhere')
    (directory / name).write_text(json.dumps(content, ensure_ascii=False), encoding='utf-8')


def first_line(error: BaseException) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
