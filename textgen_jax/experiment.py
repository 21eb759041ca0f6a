"""All configuration in one tree of dataclasses: its checks and its JSON."""

import copy
import dataclasses
import difflib
import math
import types
import typing
from typing import Any

from textgen_jax import errors
from textgen_jax import sharding as sharding_lib
from textgen_jax.data import corpora, windows
from textgen_jax.models import base, build
from textgen_jax.text import base as text_base
from textgen_jax.text import build as text_build
from textgen_jax.training import health
from textgen_jax.training import optimizer as optimizer_lib


@dataclasses.dataclass(kw_only=True)
class TrainingConfig:
  num_steps: int = 5000
  batch_size: int = 64  # rows over all devices
  sequence_length: int = 256  # tokens a row; the context that the model is trained on
  windows: str = 'random'  # random | shuffled (each once an epoch) | contiguous (streams that carry a recurrent state from batch to batch)
  reset_probability: float = 0.03  # contiguous windows only: that a row's state begins anew with a batch, as in generation
  mask_documents: bool = False  # no document sees what stands before it in its row: attention stops, carried states begin anew
  accumulation_steps: int = 1  # micro-batches that a batch is split into, by rows
  product_dtype: str = 'float32'  # of kernels and what they multiply: float32 | bfloat16 | auto (the latter on a CPU that multiplies it)
  steps_per_dispatch: int = 1  # at most, in one compiled call: more where a call takes longer than a step; best a divisor of all intervals
  log_every_steps: int = 10
  eval_every_steps: int = 500  # 0: only at the end
  eval_batch_size: int = 64
  eval_max_tokens: int = 0  # evaluate on a prefix of the split during training; 0: whole. At the end always whole
  checkpoint_every_steps: int = 500  # 0: only at the end
  keep_checkpoints: int = 2  # the latest: if one is damaged the other is used; the best by val loss is kept beside them
  keep_every_steps: int = 0  # checkpoints at multiples of it are kept for good, so that any step can soon be replayed; 0: none is
  max_skipped_steps: int = 10  # in a row without an update; so many end the run as diverged
  spike_policy: str = 'none'  # none | skip (the update of a step whose loss is a spike) | rollback (to before it, and past its batches)
  spike_deviations: float = 6.0  # a loss so many standard deviations above the mean of those before is a spike
  rollback_steps: int = 100  # how far before a spike a rollback goes
  sample_every_steps: int = -1  # -1: at every evaluation; 0: never
  sample_prompt: str = ''  # empty: the token that stands before a document
  sample_temperatures: tuple[float, ...] = (0.2, 0.5, 1.0, 1.2)
  sample_tokens: int = 200
  profile_steps: str = ''  # 'FIRST:LAST' writes a profiler trace of those steps to the workdir


@dataclasses.dataclass(kw_only=True)
class Experiment:
  """One training run."""

  seed: int = 0  # of parameters, batches and dropout
  init_from: str = ''  # a workdir whose best params to start from, with a fresh optimizer
  time_limit_minutes: float = 0.0  # from the start of the run; then it saves and ends with exit code 75. 0: none
  data: corpora.DataConfig = dataclasses.field(default_factory=corpora.DataConfig)
  tokenizer: text_base.TokenizerConfig = dataclasses.field(default_factory=text_base.TokenizerConfig)
  model: build.ModelConfig = dataclasses.field(default_factory=build.DEFAULT)
  optimizer: optimizer_lib.OptimizerConfig = dataclasses.field(default_factory=optimizer_lib.OptimizerConfig)
  sharding: sharding_lib.ShardingConfig = dataclasses.field(default_factory=sharding_lib.ShardingConfig)
  training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)


# Fields that may differ when a run goes on: none changes a step but for rounding (mesh, kernel, remat, scan_layers), what dropout
# takes (kernel, of an attention's weights; scan_layers), and what is done about spikes.
# Where text and tokenizer lie isn't compared: that they are the same is told by their fingerprints.
MAY_CHANGE = frozenset(
  ['time_limit_minutes', 'training.num_steps', 'training.keep_checkpoints', 'training.profile_steps', 'tokenizer.model_path']
  + [f'data.{name}' for name in ('corpus', 'path', 'field', 'mixture', 'val_fraction')]
  + [f'training.{name}_every_steps' for name in ('log', 'eval', 'checkpoint', 'sample', 'keep')]
  + [f'training.{name}' for name in ('eval_batch_size', 'sample_prompt', 'sample_temperatures', 'sample_tokens')]
  + ['training.steps_per_dispatch', 'training.product_dtype']
  + [f'training.{name}' for name in ('max_skipped_steps', 'spike_policy', 'spike_deviations', 'rollback_steps')]
  + ['sharding.data', 'sharding.fsdp', 'sharding.tensor', 'sharding.cpu_devices', 'sharding.rules']
  + ['model.attention_kernel', 'model.recurrence_kernel', 'model.remat', 'model.scan_layers']
)


# Fields that may differ between the processes of one run: where text and tokenizer lie on each machine.
MAY_DIFFER_BY_PROCESS = frozenset(['data.path', 'tokenizer.model_path'])


def check(experiment: Experiment) -> None:
  """Raises UserError for the first value that can't work, before anything compiles or is written."""
  check_types(experiment)
  if not 0 <= experiment.seed < 2**32:
    raise errors.UserError(f'seed={experiment.seed} is not in [0, 2**32)')
  if not 0 <= experiment.time_limit_minutes < float('inf'):
    raise errors.UserError(f'time_limit_minutes={experiment.time_limit_minutes} is not a finite number of at least 0')
  corpora.check(experiment.data)
  text_build.check(experiment.tokenizer)
  build.check(experiment.model)
  optimizer_lib.check(experiment.optimizer)
  sharding_lib.check(experiment.sharding)
  _check_training(experiment.training)
  if experiment.data.mixture and experiment.training.eval_max_tokens:
    raise errors.UserError(
      f"training.eval_max_tokens={experiment.training.eval_max_tokens}: the beginning of a mixture's val is one corpus; 0 scores all"
    )
  if experiment.training.windows == 'contiguous' and not build.carries(experiment.model):
    raise errors.UserError("training.windows='contiguous' carries a recurrent state between batches, and a Transformer has none")


def _check_training(config: TrainingConfig) -> None:
  lowest = {'sample_every_steps': -1}
  lowest |= dict.fromkeys(('eval_every_steps', 'checkpoint_every_steps', 'keep_every_steps', 'eval_max_tokens', 'sample_tokens'), 0)
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if type(value) is int and value < lowest.get(field.name, 1):
      raise errors.UserError(f'training.{field.name}={value} is below {lowest.get(field.name, 1)}')
  if config.eval_max_tokens == 1:
    raise errors.UserError('training.eval_max_tokens=1 leaves nothing to predict: at least 2, or 0 for the whole split')
  base.operand_dtype(config.product_dtype, 'cpu')
  if config.batch_size % config.accumulation_steps:
    raise errors.UserError(
      f"training.batch_size={config.batch_size} isn't divisible by training.accumulation_steps={config.accumulation_steps}"
    )
  if config.windows not in windows.KINDS:
    raise errors.not_among('training.windows', config.windows, windows.KINDS)
  if config.spike_policy not in health.POLICIES:
    raise errors.not_among('training.spike_policy', config.spike_policy, health.POLICIES)
  if not (math.isfinite(config.spike_deviations) and config.spike_deviations > 0):
    raise errors.UserError(f'training.spike_deviations={config.spike_deviations} is not a finite number above 0')
  if not 0 <= config.reset_probability <= 1:
    raise errors.UserError(f'training.reset_probability={config.reset_probability} is not in [0, 1]')
  for temperature in config.sample_temperatures:
    if not (math.isfinite(temperature) and temperature >= 0):
      raise errors.UserError(f'training.sample_temperatures has {temperature}, which is not a finite number of at least 0')
  parse_profile_steps(config.profile_steps)


def parse_profile_steps(text: str) -> range:
  """'10:15' as the steps 10 to 15, counted from 1; '' as none."""
  if not text:
    return range(0)
  first, _, last = text.partition(':')
  if not (first.isdecimal() and last.isdecimal() and len(first + last) < 20 and 1 <= int(first) <= int(last)):
    raise errors.UserError(f"training.profile_steps={text!r} is not FIRST:LAST with 1 <= FIRST <= LAST, such as '10:15'")
  return range(int(first), int(last) + 1)


def resolve(experiment: Experiment) -> Experiment:
  """A copy in which a 0 that stands for another field is replaced by it, and numbers are of their field's type."""
  resolved = copy.deepcopy(experiment)
  _use_floats(resolved)
  resolved.optimizer.schedule_steps = experiment.optimizer.schedule_steps or experiment.training.num_steps
  return resolved


def _use_floats(config: Any) -> None:
  """An int is a fine float, but its JSON would differ."""
  hints = typing.get_type_hints(type(config))
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      _use_floats(value)
    elif hints[field.name] is float:
      setattr(config, field.name, float(value))
    elif hints[field.name] == tuple[float, ...]:
      setattr(config, field.name, tuple(map(float, value)))


def check_types(config: Any, prefix: str = '') -> None:
  """Raises UserError for the first field that there isn't, or whose value isn't of the type that it declares."""
  hints = typing.get_type_hints(type(config))
  names = [field.name for field in dataclasses.fields(config)]
  for name in vars(config):
    if name not in names:  # a configuration's file can set whatever it likes
      raise errors.UserError(unknown_field(prefix + name, prefix, name, names))
  for field in dataclasses.fields(config):
    name, value, hint = prefix + field.name, getattr(config, field.name), hints[field.name]
    if dataclasses.is_dataclass(value) and isinstance(value, hint):
      check_types(value, name + '.')
    elif not _fits(value, hint):
      raise errors.UserError(f'{name}={value!r} is not of type {type_name(hint)}')
    elif hint is int and value >= 2**31 and name != 'seed':
      raise errors.UserError(f'{name}={value} is not below 2**31')


def _fits(value: Any, hint: Any) -> bool:
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    return any(_fits(value, arg) for arg in args)
  if origin is tuple:
    return isinstance(value, tuple) and all(_fits(item, args[0]) for item in value)
  if origin is list:
    return isinstance(value, list) and all(_fits(item, args[0]) for item in value)
  if origin is dict:
    return isinstance(value, dict) and all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
  if hint is float:
    return isinstance(value, int | float) and not isinstance(value, bool)
  return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def type_name(hint: Any) -> str:
  return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace('typing.', '')


def flatten(experiment: Experiment) -> dict[str, Any]:
  """`{'training.num_steps': 5000, ...}`; the model's class stands as `model.kind`."""
  return {k: v for name, value in to_json(experiment).items() for k, v in _flatten_json(value, name).items()}


def _flatten_json(value: Any, name: str) -> dict[str, Any]:
  if not isinstance(value, dict) or name == 'sharding.rules':
    return {name: value}
  return {k: v for key, item in value.items() for k, v in _flatten_json(item, f'{name}.{key}').items()}


def differences(stored: Experiment, given: Experiment) -> dict[str, str]:
  """What `given` changes of `stored`, by field: `{'seed': '0 -> 1'}`."""
  old, new = flatten(stored), flatten(given)
  return {name: f'{old.get(name)!r} -> {new.get(name)!r}' for name in {**old, **new} if old.get(name) != new.get(name)}


def to_json(experiment: Experiment) -> dict[str, Any]:
  """Plain JSON values; numbers as they are, the model with its kind."""
  content = dataclasses.asdict(experiment)
  kind = next(kind for kind, cls in build.CONFIGS.items() if isinstance(experiment.model, cls))
  content['model'] = {'kind': kind, **content['model']}
  content['training']['sample_temperatures'] = list(experiment.training.sample_temperatures)
  return content


def from_json(content: Any, source: str) -> Experiment:
  """The reverse of `to_json`. Fields that are missing get their defaults, unknown ones are refused.

  Args:
    content: parsed JSON.
    source: the file's name, for errors.
  """
  content = copy.deepcopy(content)
  if not isinstance(content, dict) or not isinstance(content.get('model'), dict):
    raise errors.UserError(f'{source}: not the configuration of an experiment')
  kind = content['model'].pop('kind', None)
  if not isinstance(kind, str) or kind not in build.CONFIGS:
    raise errors.UserError(f'{source}: model.kind={kind!r:.60} is none of {", ".join(build.CONFIGS)}')
  remat = content['model'].get('remat')
  if isinstance(remat, bool):  # what runs have stored that began before it was a name
    content['model']['remat'] = 'full' if remat else 'none'
  if kind == 'transformer' and 'dropout' in content['model']:  # which was that of attention weights too
    content['model'].setdefault('attention_dropout', content['model']['dropout'])
  experiment = Experiment(model=build.CONFIGS[kind]())
  _fill(experiment, content, source, '')
  check(experiment)
  return experiment


def _fill(config: Any, content: dict[str, Any], source: str, prefix: str) -> None:
  names = [field.name for field in dataclasses.fields(config)]
  for name, value in content.items():
    if name not in names:
      raise errors.UserError(f'{source}: {unknown_field(prefix + name, prefix, name, names)}')
    current = getattr(config, name)
    if dataclasses.is_dataclass(current):
      if not isinstance(value, dict):
        raise errors.UserError(f'{source}: {prefix}{name}={value!r} is not an object')
      _fill(current, value, source, f'{prefix}{name}.')
    else:
      setattr(config, name, tuple(value) if isinstance(current, tuple) and isinstance(value, list) else value)


def unknown_field(path: str, prefix: str, name: str, names: list[str]) -> str:
  near = difflib.get_close_matches(name, names, 1, cutoff=0.5)
  return f'there is no field {path}' + (f'; did you mean {prefix}{near[0]}?' if near else f'; there are {", ".join(names)}')
