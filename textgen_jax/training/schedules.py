"""Learning rate as a function of the optimizer's own count of updates."""

import optax

from textgen_jax import errors

KINDS = ('cosine', 'linear', 'constant', 'wsd')


def build(kind: str, *, peak: float, final: float, warmup_steps: int, total_steps: int, decay_fraction: float) -> optax.Schedule:
  """Linear warm-up to `peak`, then one of:

  cosine: half a cosine down to `final` at `total_steps` (Loshchilov & Hutter 2017).
  linear: a straight line down to `final` at `total_steps`.
  constant: stays at `peak`.
  wsd: stays at `peak`, then falls in a line to `final` over the last
    `decay_fraction` of `total_steps`, at the earliest from the warm-up's end on
    (warmup-stable-decay; Hu et al. 2024, arXiv:2404.06395).

  Past `total_steps` the last rate holds. The first update already has a rate above
  0: update n of the warm-up runs at n / warmup_steps of the peak, counted from 1.
  """
  rest = max(1, total_steps - warmup_steps)  # a run may well end within its warm-up
  if kind == 'cosine':
    after = optax.cosine_decay_schedule(peak, rest, alpha=final / peak if peak else 0.0)
  elif kind == 'linear':
    after = optax.linear_schedule(peak, final, rest)
  elif kind == 'constant':
    after = optax.constant_schedule(peak)
  elif kind == 'wsd':
    decay = min(rest, max(1, round(decay_fraction * total_steps)))
    after = optax.linear_schedule(peak, final, decay, transition_begin=rest - decay)
  else:
    raise errors.not_among('optimizer.schedule', kind, KINDS)
  if not warmup_steps:
    return after
  warmup = optax.linear_schedule(peak / warmup_steps, peak, max(1, warmup_steps - 1))
  return optax.join_schedules([warmup, after], [warmup_steps])
