"""Speculative decoding: a small draft model guesses the next tokens, the model reads them all in one call and keeps those that hold.

A guess x, drawn from the draft's distribution q, holds with probability min(1, p(x) / q(x)), p being the model's; what takes the
place of the first that doesn't is drawn from max(0, p - q). So each token is distributed as the model alone would have it, whatever
the draft; both distributions are those after all settings. At temperature 0 a guess holds where it is the likeliest token.
Source: Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318.

The text is another one than without a draft, but where they are equally distributed: a model that guesses for itself writes what it
writes alone. (Guesses by the same random number as the model's own draw, which hold where the two are equal, would leave every text as
it is; of those of configs/shakespeare_char.py 0.47 held where 0.66 do.)
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from textgen_jax.models import base
from textgen_jax.sampling import decode as decode_lib
from textgen_jax.sampling import knobs as knobs_lib
from textgen_jax.sampling import params as params_lib
from textgen_jax.sampling import rows as rows_lib
from textgen_jax.sampling import transforms

ROLES = (2**32 - 1, 2**32 - 2)  # no place has these numbers


class Draft(NamedTuple):
  """A model that guesses; of the same tokenizer."""

  model: base.LanguageModel
  params: Any
  tokens: int = params_lib.DRAFT_TOKENS  # guessed at a time


class Chances(NamedTuple):
  """Uniform numbers in [0, 1), one for each place, [B, T], or [T] of one row.

  They belong to the place, whatever the rounds: one that only decided guesses that were thrown away is as good as new, since nothing
  that was kept depends on it.
  """

  draw: jax.Array  # of a guess, and of a token without one, as in plain decoding
  hold: jax.Array  # whether the guess holds
  instead: jax.Array  # of what takes its place


def throw(key_B: jax.Array, position_B: jax.Array, size: int) -> Chances:
  """The numbers of `size` places from each row's position on."""
  roles = [key_B, *(jax.vmap(lambda key, role=role: jax.random.fold_in(key, role))(key_B) for role in ROLES)]
  return Chances(*(rows_lib.uniforms(key_B, position_B, size) for key_B in roles))


class Caches(NamedTuple):
  """Of the two models, both before `rows.token_B`. Rows write at places of their own: neither may be used in a common call."""

  own: Any
  draft: Any


@functools.partial(jax.jit, static_argnames=('model', 'draft_model', 'uses', 'size', 'ahead'), donate_argnames=('caches', 'rows'))
def decode(
  model: base.LanguageModel,
  params: Any,
  draft_model: base.LanguageModel,
  draft_params: Any,
  caches: Caches,
  rows: rows_lib.Rows,
  table: Any,
  limit: jax.Array,
  *,
  uses: knobs_lib.Uses,
  size: int,
  ahead: int,
) -> tuple[Caches, rows_lib.Rows, rows_lib.Trace, jax.Array, jax.Array]:
  """As `decode.decode`, in rounds of `ahead` guesses and one call of the model.

  Args:
    model: the model whose text it is.
    params: its parameters.
    draft_model: the one that guesses.
    draft_params: its parameters.
    caches: begun with `rewinds` of at least `ahead + 1` and as many slots more than `limit`, for a row that waits for others
      goes on reading; donated.
    rows: the rows' state, without guidance; donated.
    table: the rows' constraints (`constraint.Table`); None without any.
    limit: at most `size`; traced.
    uses: which settings are on; static.
    size: most tokens a row; static.
    ahead: guesses a round, at least 0; static.

  Returns:
    What `decode.decode` does, and how many rounds each row took part in, int32 [B].
  """
  batch = rows.token_B.shape[0]
  chances = throw(rows.knobs.key_B, rows.history.drawn_B, size + ahead + 1)

  def one(caches: Caches, row: rows_lib.Rows, trace: rows_lib.Trace, made: jax.Array, sound: jax.Array, chances: Chances) -> Any:
    caches, row = jax.tree.map(lambda leaf: leaf[None], (caches, row))
    chances = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, made, ahead + 1), chances)
    models = model, params, draft_model, draft_params
    caches, row, seen, taken_T, sound_T = play_round(*models, caches, row, table, chances, limit - made, uses)
    trace = jax.tree.map(lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new, made, axis=0), trace, seen)
    caches, row = jax.tree.map(lambda leaf: leaf[0], (caches, row))
    return caches, row, trace, made + taken_T.sum(dtype=jnp.int32), sound & (sound_T | ~taken_T).all()

  def body(carry: Any) -> Any:
    caches, rows, trace, made_B, sound_B, rounds_B = carry
    rounds_B = rounds_B + (~rows.done_B & (made_B < limit))
    return *jax.vmap(one)(caches, rows, trace, made_B, sound_B, chances), rounds_B

  def unfinished(carry: Any) -> jax.Array:
    return (~carry[1].done_B & (carry[3] < limit)).any()

  none_B = jnp.zeros((batch,), jnp.int32)
  trace = rows_lib.new_trace(batch, size + ahead + 1, uses)
  caches, rows, trace, _, sound_B, rounds_B = jax.lax.while_loop(
    unfinished, body, (caches, rows, trace, none_B, jnp.ones((batch,), bool), none_B)
  )
  return caches, rows, trace, sound_B, rounds_B


def play_round(
  model: base.LanguageModel,
  params: Any,
  draft_model: base.LanguageModel,
  draft_params: Any,
  caches: Caches,
  row: rows_lib.Rows,
  table: Any,
  chances: Chances,
  room: jax.Array,
  uses: knobs_lib.Uses,
) -> tuple[Caches, rows_lib.Rows, rows_lib.Trace, jax.Array, jax.Array]:
  """One row's guesses, and what the model makes of them; B is 1, T the guesses and one.

  Returns:
    Caches and row after the tokens that were taken, at most `room` of them and none where the row is done; the trace of all
    T, without a batch axis; which of them were taken, bool [T]; and which the model's logits were sound for, bool [T].
  """

  def guess(carry: Any, uniform: jax.Array) -> Any:
    token_B, cache, history = carry
    logits_BV, cache = base.step_in_loop(draft_model, draft_params, token_B, cache, len(chances.draw) - 1)
    adjusted_BV = decode_lib.adjust(_widen(logits_BV, row.knobs.ends_BV.shape[1]), history, row.knobs, uses, table)
    token_B, narrowed_BV = decode_lib.next_token(adjusted_BV, uniform[None], row.knobs, uses)
    return (token_B, cache, rows_lib.follow(history, token_B, uses, table)), (token_B, narrowed_BV, history)

  first = row.token_B, caches.draft, row.history
  (last_B, draft_cache, history), (guess_TB, guessed_TBV, history_TB) = jax.lax.scan(guess, first, chances.draw[:-1])
  _, draft_cache = draft_model.apply({'params': draft_params}, last_B[:, None], cache=draft_cache)
  hidden_BTD, cache = model.apply({'params': params}, jnp.concatenate([row.token_B, guess_TB[:, 0]])[None], cache=caches.own)
  logits_TV = model.apply({'params': params}, hidden_BTD, method='unembed')[0]
  # The places of the round take the rows' part: what is done for a batch is done for them.
  history_T = jax.tree.map(lambda before, after: jnp.concatenate([before[:, 0], after]), history_TB, history)
  knobs_T = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[0], chances.draw.shape + leaf.shape[1:]), row.knobs)
  adjusted_TV = decode_lib.adjust(logits_TV, history_T, knobs_T, uses, table)
  token_T, narrowed_TV = decode_lib.next_token(adjusted_TV, chances.draw, knobs_T, uses)
  right = jnp.cumprod(guess_TB[:, 0] == token_T[:-1]).sum()
  if guessed_TBV is not None and narrowed_TV is not None:
    drawn = row.knobs.temperature_B[0] > 0
    held, instead_T = judge(guess_TB[:, 0], guessed_TBV[:, 0], narrowed_TV[:-1], chances)
    right = jnp.where(drawn, held, right)
    token_T = token_T.at[:-1].set(jnp.where(drawn, instead_T, token_T[:-1]))
  token_T = token_T.at[:-1].set(jnp.where(jnp.arange(token_T.size - 1) < right, guess_TB[:, 0], token_T[:-1]))
  seen = rows_lib.observe(token_T, logits_TV, narrowed_TV, knobs_T, uses)

  def take(row: rows_lib.Rows, step: Any) -> Any:
    i, seen = step
    log_prob_B = None if seen.log_prob is None else seen.log_prob[None]
    on = (i <= right) & (i < room) & ~row.done_B[0]
    longer = rows_lib.advance(row, seen.token[None], log_prob_B, uses, table)
    return jax.tree.map(functools.partial(jnp.where, on), longer, row), on

  row, taken_T = jax.lax.scan(take, row, (jnp.arange(token_T.size), seen))
  back_B = (token_T.size - taken_T.sum(dtype=jnp.int32))[None]
  caches = Caches(model.rewind(cache, back_B), draft_model.rewind(draft_cache, back_B))
  return caches, row, seen, taken_T, decode_lib.is_sound(logits_TV, adjusted_TV, uses)


def judge(guess_T: jax.Array, guessed_TV: jax.Array, own_TV: jax.Array, chances: Chances) -> tuple[jax.Array, jax.Array]:
  """How many guesses hold before the first that doesn't, and what would take the place of each, [T].

  Args:
    guess_T: the guesses.
    guessed_TV: logits that they were drawn from.
    own_TV: the model's in the same places.
    chances: of these places, and of one more.
  """
  q_TV, p_TV = jax.nn.softmax(guessed_TV, axis=-1), jax.nn.softmax(own_TV, axis=-1)
  q_T, p_T = (jnp.take_along_axis(x_TV, guess_T[:, None], axis=1)[:, 0] for x_TV in (q_TV, p_TV))
  rest_TV = jnp.maximum(p_TV - q_TV, 0.0)
  # Where the two are equal but for rounding nothing may be left: then it's the model's own.
  rest_TV = jnp.where(rest_TV.any(axis=-1, keepdims=True), rest_TV, p_TV)
  return jnp.cumprod(chances.hold[:-1] * q_T < p_T).sum(), transforms.draw(jnp.log(rest_TV), chances.instead[:-1])


def _widen(logits_BV: jax.Array, size: int) -> jax.Array:
  """Logits of a vocabulary that is padded otherwise, in `size`: ids beyond the tokenizer's are padding in both."""
  logits_BV = logits_BV[:, :size]
  return jnp.pad(logits_BV, ((0, 0), (0, size - logits_BV.shape[1])), constant_values=-jnp.inf)
