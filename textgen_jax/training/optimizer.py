"""AdamW, Muon and others behind a clip by global norm, with tables of what decays and of what learns at which rate."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from textgen_jax import errors, trees
from textgen_jax.training import muon, schedules

# Tables of vectors and matrices decay; what scales or shifts doesn't (as in GPT-2 and nanoGPT).
DECAY_RULES = (
  (r'(^|/|_)(embedding|kernel)$', True),
  (r'(^|/|_)(scale|bias)$', False),
)

# What learns together: the fields `<group>_lr_scale`, and `matrix`, which Muon takes.
GROUP_RULES = (
  (r'(^|/)unembedding/kernel$', 'unembedding'),
  (r'(^|/|_)embedding$', 'embedding'),
  (r'(^|/|_)kernel$', 'matrix'),
  (r'(^|/|_)(scale|bias)$', 'vector'),
)
GROUPS = ('embedding', 'unembedding', 'vector', 'matrix')

KINDS = ('adamw', 'muon', 'lion', 'adafactor', 'sgd', 'schedule_free')


@dataclasses.dataclass(kw_only=True)
class OptimizerConfig:
  kind: str = 'adamw'  # adamw | muon (of the layers' matrices; AdamW for all else) | lion | adafactor | sgd | schedule_free (AdamW)
  peak_lr: float = 1e-3
  final_lr: float = 1e-4  # where the schedule ends
  schedule: str = 'cosine'  # cosine | linear | constant | wsd
  schedule_steps: int = 0  # the schedule's horizon; 0: training.num_steps as first given (kept when more are asked for)
  warmup_steps: int = 100
  decay_fraction: float = 0.2  # of the horizon; the last part of wsd
  b1: float = 0.9  # also sgd's momentum, and how far schedule_free interpolates; adafactor has none
  b2: float = 0.99  # not of sgd and adafactor
  eps: float = 1e-8  # of adamw, and of schedule_free and muon's AdamW
  weight_decay: float = 0.1  # adafactor has none
  clip_norm: float = 1.0  # global norm of the gradient; 0: no clip
  matrix_lr: float = 0.02  # muon's peak, for the layers' matrices; its schedule has the shape of the others'
  matrix_momentum: float = 0.95  # muon's
  embedding_lr_scale: float = 1.0  # times the rate, for tables of tokens and positions
  unembedding_lr_scale: float = 1.0  # times the rate, for an output table of its own
  vector_lr_scale: float = 1.0  # times the rate, for scales and biases
  average_decay: float = 0.0  # of the moving average of parameters that is scored, saved and sampled from; 0: they are as trained


def check(config: OptimizerConfig) -> None:
  """Raises UserError for a value out of its range; NaN is in no range."""

  def need(name: str, holds: bool, constraint: str) -> None:
    if not holds:
      raise errors.UserError(f'optimizer.{name}={getattr(config, name)!r} is not {constraint}')

  if config.kind not in KINDS:
    raise errors.not_among('optimizer.kind', config.kind, KINDS)
  scales = [f'{group}_lr_scale' for group in GROUPS if group != 'matrix']
  for name in ('peak_lr', 'final_lr', 'weight_decay', 'clip_norm', 'matrix_lr', *scales):
    value = getattr(config, name)
    need(name, math.isfinite(value) and value >= 0, 'a finite number of at least 0')
  need('eps', math.isfinite(config.eps) and config.eps > 0, 'a finite number above 0')
  for name in ('b1', 'b2', 'matrix_momentum', 'average_decay'):
    need(name, 0 <= getattr(config, name) < 1, 'in [0, 1)')
  if config.kind == 'schedule_free':
    need('b1', config.b1 > 0, "above 0, which optimizer.kind='schedule_free' needs")
    if config.average_decay:
      raise errors.UserError(f"optimizer.average_decay={config.average_decay}: optimizer.kind='schedule_free' averages by itself")
    for name in scales:  # they would scale what it averages out of proportion
      need(name, getattr(config, name) == 1, "1, which optimizer.kind='schedule_free' needs")
  need('decay_fraction', 0 <= config.decay_fraction <= 1, 'in [0, 1]')
  for name in ('warmup_steps', 'schedule_steps'):
    need(name, getattr(config, name) >= 0, 'at least 0')
  if config.schedule not in schedules.KINDS:
    raise errors.not_among('optimizer.schedule', config.schedule, schedules.KINDS)


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
  """The rate by update; `config.schedule_steps` must be resolved (above 0)."""
  return schedules.build(
    config.schedule,
    peak=config.peak_lr,
    final=config.final_lr,
    warmup_steps=config.warmup_steps,
    total_steps=config.schedule_steps,
    decay_fraction=config.decay_fraction,
  )


def decay_mask(params: Any) -> Any:
  """True at each parameter that weight decay pulls towards zero."""
  decays = trees.match_rules(DECAY_RULES, (name for name, _ in trees.named_leaves(params)), 'weight decay')
  return trees.map_with_names(lambda name, _: decays[name], params)


def groups(params: Any) -> Any:
  """Each parameter's group, of `GROUPS`."""
  found = trees.match_rules(GROUP_RULES, (name for name, _ in trees.named_leaves(params)), 'learning rate')
  return trees.map_with_names(lambda name, _: found[name], params)


def build(config: OptimizerConfig, spread: muon.Spread = muon.alone) -> optax.GradientTransformation:
  """What turns gradients into updates.

  Args:
    config: its `schedule_steps` must be resolved (above 0).
    spread: splits a stack of matrices over devices, for Muon.
  """
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
  tx = optax.chain(clip, _BUILDERS[config.kind](config, spread))
  scales = {group: getattr(config, f'{group}_lr_scale') for group in GROUPS if group != 'matrix'}
  if any(scale != 1 for scale in scales.values()):
    by_group = {'matrix': optax.identity()} | {group: optax.scale(scale) for group, scale in scales.items()}
    tx = optax.chain(tx, optax.partition(by_group, groups))
  return tx


# (the average so far, the parameters after an update, the optimizer's state after it, updates before it) -> the average.
Average = Callable[[Any, Any, Any, jax.Array], Any]


def make_average(config: OptimizerConfig) -> Average | None:
  """What is scored, saved for sampling and sampled from in place of the parameters as trained; None: those themselves.

  An exponential average forgets faster at first, by (1 + n) / (10 + n) after n updates, so that it isn't one of the first parameters.
  Source: Polyak & Juditsky 1992; the first steps as in TensorFlow's ExponentialMovingAverage.
  """
  if config.kind == 'schedule_free':
    return lambda average, params, opt_state, updates: contrib.schedule_free_eval_params(_free_state(opt_state), params)
  if not config.average_decay:
    return None

  def moving(average: Any, params: Any, opt_state: Any, updates: jax.Array) -> Any:
    keep = jnp.minimum(config.average_decay, (1.0 + updates) / (10.0 + updates))
    return jax.tree.map(lambda a, p: keep * a + (1 - keep) * p, average, params)

  return moving


def _free_state(opt_state: Any) -> contrib.ScheduleFreeState:
  (found,) = [s for s in jax.tree.leaves(opt_state, is_leaf=_is_free_state) if _is_free_state(s)]
  return found


def _is_free_state(node: Any) -> bool:
  return isinstance(node, contrib.ScheduleFreeState)


def _adamw(config: OptimizerConfig, spread: muon.Spread) -> optax.GradientTransformation:
  """Source: Loshchilov & Hutter 2019, arXiv:1711.05101."""
  del spread
  return optax.adamw(
    make_schedule(config), b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decay_mask
  )


def _muon(config: OptimizerConfig, spread: muon.Spread) -> optax.GradientTransformation:
  """Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, with weight decay as in Liu et al. 2025, arXiv:2502.16982."""
  rate = config.matrix_lr / config.peak_lr if config.peak_lr else 0.0
  schedule = make_schedule(config)
  matrices = optax.chain(
    muon.scale_by_muon(config.matrix_momentum, spread),
    optax.add_decayed_weights(config.weight_decay),
    optax.scale_by_learning_rate(lambda count: rate * schedule(count)),
  )
  return optax.partition(
    {'matrix': matrices, 'other': _adamw(config, spread)},
    lambda params: trees.map_with_names(lambda _, group: 'matrix' if group == 'matrix' else 'other', groups(params)),
  )


def _lion(config: OptimizerConfig, spread: muon.Spread) -> optax.GradientTransformation:
  """Source: Chen et al. 2023, arXiv:2302.06675."""
  del spread
  return optax.lion(make_schedule(config), b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decay_mask)


def _adafactor(config: OptimizerConfig, spread: muon.Spread) -> optax.GradientTransformation:
  """Source: Shazeer & Stern 2018, arXiv:1804.04235, with rates relative to each parameter's size."""
  del spread
  return optax.adafactor(make_schedule(config), weight_decay_rate=None, momentum=None)


def _sgd(config: OptimizerConfig, spread: muon.Spread) -> optax.GradientTransformation:
  """With Nesterov momentum; decayed weights are part of the gradient, as in AWD-LSTM."""
  del spread
  decay = optax.add_decayed_weights(config.weight_decay, decay_mask)
  return optax.chain(decay, optax.sgd(make_schedule(config), momentum=config.b1 or None, nesterov=config.b1 > 0))


def _schedule_free(config: OptimizerConfig, spread: muon.Spread) -> optax.GradientTransformation:
  """AdamW under an average that stands for the schedule's end. Source: Defazio et al. 2024, arXiv:2405.15682."""
  return contrib.schedule_free(_adamw(dataclasses.replace(config, b1=0.0), spread), make_schedule(config), b1=config.b1)


_BUILDERS: dict[str, Callable[[OptimizerConfig, muon.Spread], optax.GradientTransformation]] = {
  'adamw': _adamw,
  'muon': _muon,
  'lion': _lion,
  'adafactor': _adafactor,
  'sgd': _sgd,
  'schedule_free': _schedule_free,
}
