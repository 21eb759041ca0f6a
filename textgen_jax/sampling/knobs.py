"""The settings of a batch's rows as arrays, and which of them are in use."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from textgen_jax.models import base
from textgen_jax.sampling import constraint
from textgen_jax.sampling import history as history_lib
from textgen_jax.sampling import params as params_lib

Transform = Callable[[jax.Array, history_lib.History], jax.Array]

SHORT = base.MIN_TURNS  # tokens


class Vocab(NamedTuple):
  """What sampling needs to know of a vocabulary."""

  size: int  # of the logits: padding counts
  end_of_text: int | None = None
  unknown: int | None = None

  def ends(self, row: params_lib.SamplingParams) -> list[int]:
    """The ids that end a row."""
    if self.end_of_text is None or not (row.stop_at_end or constraint.wanted(row)):
      return list(row.stop_tokens)
    return [*row.stop_tokens, self.end_of_text]

  def banned(self, row: params_lib.SamplingParams) -> list[int]:
    """The ids that a row never draws."""
    return [*row.banned_tokens, *([] if self.unknown is None or row.allow_unknown else [self.unknown])]


class Uses(NamedTuple):
  """Which parts any row needs; the others are compiled out. Fields of `SamplingParams` are in use where they aren't at their default."""

  draw: bool
  top_k: bool  # this and the next three: by rows that are drawn
  top_p: bool
  min_p: bool
  typical_p: bool
  repetition_penalty: bool
  presence_penalty: bool
  frequency_penalty: bool
  no_repeat_ngram: bool
  min_new_tokens: bool
  guidance: bool
  logit_bias: bool
  bans: bool
  constraint: bool
  log_probs: bool
  alternatives: int
  short: bool  # no row may have as many as SHORT tokens
  extra: tuple[Transform, ...] = ()  # the caller's own, after the bans

  @classmethod
  def of(cls, rows: Sequence[params_lib.SamplingParams], vocab: Vocab, extra: Sequence[Transform] = ()) -> 'Uses':
    drawn = [row for row in rows if row.temperature > 0]
    narrowing = ('top_k', 'top_p', 'min_p', 'typical_p')
    others = ('repetition_penalty', 'presence_penalty', 'frequency_penalty', 'no_repeat_ngram', 'min_new_tokens', 'guidance', 'logit_bias')
    changed = {name: any(getattr(row, name) != _DEFAULTS[name] for row in drawn) for name in narrowing}
    changed |= {name: any(getattr(row, name) != _DEFAULTS[name] for row in rows) for name in others}
    return cls(
      draw=bool(drawn),
      **changed,
      bans=any(vocab.banned(row) for row in rows),
      constraint=any(map(constraint.wanted, rows)),
      log_probs=any(row.log_probs or row.alternatives or row.best_of or np.isfinite(row.min_log_prob) for row in rows),
      alternatives=max((row.alternatives for row in rows), default=0),
      short=all(row.max_new_tokens < SHORT for row in rows),
      extra=tuple(extra),
    )

  @property
  def counts(self) -> bool:
    """Whether the history must count tokens."""
    return self.repetition_penalty or self.presence_penalty or self.frequency_penalty or bool(self.extra)

  @property
  def tokens(self) -> bool:
    """Whether the history must hold the tokens."""
    return self.no_repeat_ngram or bool(self.extra)


class Knobs(NamedTuple):
  """Sampling settings, one a row; all traced, so that another value compiles nothing. What no row uses of the last two is None."""

  temperature_B: jax.Array
  top_k_B: jax.Array
  top_p_B: jax.Array
  min_p_B: jax.Array
  typical_p_B: jax.Array
  repetition_penalty_B: jax.Array
  presence_penalty_B: jax.Array
  frequency_penalty_B: jax.Array
  no_repeat_ngram_B: jax.Array
  min_new_tokens_B: jax.Array
  max_new_tokens_B: jax.Array
  guidance_B: jax.Array
  min_log_prob_B: jax.Array
  key_B: jax.Array  # uint32 key data, [B, 2]; the row's own, whatever its place
  ends_BV: jax.Array  # bool: the tokens that end the row
  bias_BV: jax.Array | None  # nats
  banned_BV: jax.Array | None  # bool

  @classmethod
  def of(cls, rows: Sequence[params_lib.SamplingParams], key_B: Any, uses: Uses, vocab: Vocab) -> 'Knobs':
    names = [field for field in cls._fields if field.removesuffix('_B') in _DEFAULTS]
    return cls(
      **{name: _gather(rows, name.removesuffix('_B')) for name in names},
      key_B=jnp.asarray(key_B),
      ends_BV=_mark(map(vocab.ends, rows), len(rows), vocab.size),
      bias_BV=_add_up(rows, vocab.size) if uses.logit_bias else None,
      banned_BV=_mark(map(vocab.banned, rows), len(rows), vocab.size) if uses.bans else None,
    )


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(params_lib.SamplingParams)}


def _gather(rows: Sequence[params_lib.SamplingParams], name: str) -> jax.Array:
  """A field of all rows, int32 or float32."""
  values = np.array([getattr(row, name) for row in rows])
  if isinstance(_DEFAULTS[name], int):
    return jnp.asarray(values.astype(np.int32))
  if name == 'temperature':
    # Draws are argmax below 1e-30 and uniform above 1e30 as it is; further out float32 has no reciprocal, and 0 * -inf is NaN.
    values = np.where(values > 0, np.clip(values.astype(np.float64), 1e-30, 1e30), 0.0)
  if name != 'min_log_prob':  # which is only compared
    values = np.clip(values.astype(np.float64), -1e30, 1e30)  # float32 ends at 3e38, and 0 * inf is NaN
  return jnp.asarray(values, jnp.float32)


def _mark(ids: Iterable[Sequence[int]], num_rows: int, size: int) -> jax.Array:
  marked_BV = np.zeros((num_rows, size), bool)
  for line, marked in zip(marked_BV, ids, strict=True):
    line[list(marked)] = True
  return jnp.asarray(marked_BV)


def _add_up(rows: Sequence[params_lib.SamplingParams], size: int) -> jax.Array:
  bias_BV = np.zeros((len(rows), size))
  for line, row in zip(bias_BV, rows, strict=True):
    for token, bias in row.logit_bias:
      line[token] += np.clip(bias, -1e30, 1e30)  # float32 ends at 3e38, and inf - inf is NaN
  return jnp.asarray(np.clip(bias_BV, -1e30, 1e30), jnp.float32)
