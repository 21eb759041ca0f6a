"""What a workdir holds, and a trained model read back from it."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import platform
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from textgen_jax import errors, processes, trees
from textgen_jax import experiment as experiment_lib
from textgen_jax.models import base, build
from textgen_jax.text import base as text_base
from textgen_jax.text import build as text_build
from textgen_jax.training import checkpoints

LOCK = 'lock'  # the file that a trainer holds


@dataclasses.dataclass(frozen=True)
class Trained:
  """A model ready to be used."""

  model: Any
  params: Any
  tokenizer: text_base.Tokenizer
  experiment: experiment_lib.Experiment
  step: int
  fingerprint: str  # of the data that it was trained on


def load(workdir: str | os.PathLike, checkpoint: str = 'best') -> Trained:
  """Reads a trained model.

  Args:
    workdir: of a training run.
    checkpoint: 'best' (by val loss; the latest where none was scored), 'latest', or a step's number.

  Raises:
    UserError: no such workdir, nothing was ever saved in it, or it has no such step.
    NoGoodCheckpoint: the step can't be read.
  """
  path = pathlib.Path(workdir)
  if not stored_steps(path):
    raise errors.UserError(f'workdir={str(path)!r}: no checkpoint was ever written there')
  kept = checkpoints.Checkpoints(path, read_only=True)
  step = _choose(kept, checkpoint, path)
  about = kept.about(step)
  where = f'{path}/checkpoints/{step}'
  experiment, fingerprint = described(about, where)
  try:
    tokenizer = tokenizer_from(about.get('tokenizer'))
  except (errors.RunError, OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
    raise errors.NoGoodCheckpoint(f'{where}: its tokenizer is damaged: {checkpoints.first_line(error)}') from error
  found, wanted = tokenizer.fingerprint(), str(about.get('tokenizer_sha256'))
  if found != wanted:
    raise errors.UserError(f'{where}: its tokenizer has SHA-256 {found[:12]}, and it was trained with {wanted[:12]}')
  model = build.build(experiment.model, tokenizer.vocab_size, experiment.training.sequence_length)
  params = kept.restore_params(step, abstract_params(model))
  kept.close()
  # On the host: JAX would compile two programs for each shape, 0.5 s of a start of sample.py.
  bad = [name for name, leaf in trees.named_leaves(params) if not np.isfinite(np.asarray(leaf)).all()]
  if bad:
    raise errors.NoGoodCheckpoint(f'{path}/checkpoints/{step}: parameter {bad[0]} holds values that are not finite')
  return Trained(model, params, tokenizer, experiment, step, fingerprint)


def _choose(kept: checkpoints.Checkpoints, checkpoint: str, path: pathlib.Path) -> int:
  steps = processes.from_leader(kept.steps)
  if checkpoint == 'best' and (best := kept.first_good(processes.from_leader(kept.best_steps), checkpoints.TO_SAMPLE)) is not None:
    return best
  if checkpoint in ('best', 'latest'):
    latest = kept.newest_good(checkpoints.TO_SAMPLE)
    if latest is not None:
      return latest
  elif checkpoint in map(str, steps):
    return int(checkpoint)
  if not steps:  # deleted since they were listed
    raise errors.UserError(f'workdir={str(path)!r}: its checkpoints are gone')
  raise errors.not_among('checkpoint', checkpoint, ['best', 'latest', *map(str, steps)])


def abstract_params(model: Any) -> Any:
  """Shapes of a model's parameters, on a device of this process."""
  shapes = nn.unbox(jax.eval_shape(lambda: base.init_params(model, jax.random.PRNGKey(0))))
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)


def described(about: Any, where: str) -> tuple[experiment_lib.Experiment, str]:
  """What a checkpoint says it was trained as, and its data's fingerprint.

  Raises:
    NoGoodCheckpoint: it doesn't say.
  """
  fingerprint = about.get('fingerprint') if isinstance(about, dict) else None
  if not isinstance(fingerprint, str):
    raise errors.NoGoodCheckpoint(f'{where}: it says nothing of the data that it was trained on')
  try:
    return experiment_lib.from_json(about.get('experiment'), where), fingerprint
  except errors.UserError as error:
    raise errors.NoGoodCheckpoint(str(error) if where in str(error) else f'{where}: {error}') from error


def tokenizer_from(files: Any) -> text_base.Tokenizer:
  """A tokenizer from the files that a checkpoint holds."""
  fields = files.get(text_base.FILE_NAME) if isinstance(files, dict) else None
  return text_build.from_fields(fields, f'tokenizer/{text_base.FILE_NAME}')


def tokenizer_files(tokenizer: text_base.Tokenizer) -> dict[str, Any]:
  """The reverse of `tokenizer_from`."""
  return {text_base.FILE_NAME: tokenizer.fields()}


def stored_steps(workdir: pathlib.Path) -> list[int]:
  """The steps that have a folder there, whole or not."""
  return processes.from_leader(lambda: checkpoints.listed(workdir / 'checkpoints'))


def newest(workdir: pathlib.Path) -> tuple[int, dict[str, Any]] | None:
  """The newest step that is whole, and what it says of itself; None where none was ever written.

  Raises:
    NoGoodCheckpoint: there are steps, and none is whole.
  """
  if not stored_steps(workdir):
    return None
  with contextlib.closing(checkpoints.Checkpoints(workdir, read_only=True)) as kept:
    step = kept.newest_good()
    return None if step is None else (step, kept.about(step))


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
  """Makes the workdir where it is missing, and keeps other trainers out of it; a process that dies lets them in.

  Raises:
    UserError: another process trains there.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / LOCK
  while True:
    with path.open('a+', encoding='utf-8') as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        file.seek(0)
        owner = file.read(100).strip() or 'another process'
        raise errors.UserError(f'workdir={str(workdir)!r} is being trained by {owner}') from error
      if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        continue  # its owner deleted it between our opening and our locking it
      try:
        file.truncate(0)
        file.write(f'process {os.getpid()} on {platform.node()}\n')
        file.flush()
        yield
      finally:
        path.unlink(missing_ok=True)
      return


def write_config(workdir: pathlib.Path, experiment: experiment_lib.Experiment, tokenizer: text_base.Tokenizer) -> None:
  """Writes `config.json` and `tokenizer/`; the leader does, of several processes."""
  processes.from_leader(lambda: _write_config(workdir, experiment, tokenizer))


def _write_config(workdir: pathlib.Path, experiment: experiment_lib.Experiment, tokenizer: text_base.Tokenizer) -> None:
  workdir.mkdir(parents=True, exist_ok=True)
  tokenizer.save(workdir / 'tokenizer')
  temporary = workdir / 'config.json.tmp'
  temporary.write_text(json.dumps(experiment_lib.to_json(experiment), indent=2, allow_nan=False) + '\n', encoding='utf-8')
  os.replace(temporary, workdir / 'config.json')
