"""AdamW behind a clip by global norm, with a table of what decays."""

import dataclasses
import math
from typing import Any

import optax

from textgen_jax import errors, trees
from textgen_jax.training import schedules

# Tables of vectors and matrices decay; what scales or shifts doesn't (as in GPT-2 and nanoGPT).
DECAY_RULES = (
  (r'(^|/|_)(embedding|kernel)$', True),
  (r'(^|/|_)(scale|bias)$', False),
)


@dataclasses.dataclass(kw_only=True)
class OptimizerConfig:
  peak_lr: float = 1e-3
  final_lr: float = 1e-4  # where the schedule ends
  schedule: str = 'cosine'  # cosine | linear | constant | wsd
  schedule_steps: int = 0  # the schedule's horizon; 0: training.num_steps as first given (kept when more are asked for)
  warmup_steps: int = 100
  decay_fraction: float = 0.2  # of the horizon; the last part of wsd
  b1: float = 0.9
  b2: float = 0.99
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0  # global norm of the gradient; 0: no clip


def check(config: OptimizerConfig) -> None:
  """Raises UserError for a value out of its range; NaN is in no range."""

  def need(name: str, holds: bool, constraint: str) -> None:
    if not holds:
      raise errors.UserError(f'optimizer.{name}={getattr(config, name)!r} is not {constraint}')

  for name in ('peak_lr', 'final_lr', 'weight_decay', 'clip_norm'):
    value = getattr(config, name)
    need(name, math.isfinite(value) and value >= 0, 'a finite number of at least 0')
  need('eps', math.isfinite(config.eps) and config.eps > 0, 'a finite number above 0')
  for name in ('b1', 'b2'):
    need(name, 0 <= getattr(config, name) < 1, 'in [0, 1)')
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


def build(config: OptimizerConfig) -> optax.GradientTransformation:
  """Source: Loshchilov & Hutter 2019, arXiv:1711.05101."""
  adamw = optax.adamw(
    make_schedule(config), b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decay_mask
  )
  return optax.chain(optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(), adamw)
