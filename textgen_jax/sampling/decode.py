"""The compiled parts of generation: reading a prompt, and a loop that draws a segment of tokens."""

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from textgen_jax import errors
from textgen_jax.models import base
from textgen_jax.sampling import constraint, transforms
from textgen_jax.sampling import history as history_lib
from textgen_jax.sampling import knobs as knobs_lib
from textgen_jax.sampling import rows as rows_lib


def adjust(logits_BV: jax.Array, history: history_lib.History, knobs: knobs_lib.Knobs, uses: knobs_lib.Uses, table: Any) -> jax.Array:
  """Logits after all that comes before the temperature; `logits_BV` holds the negative prompts' rows too where guidance is used."""
  if uses.guidance:
    logits_BV, negative_BV = jnp.split(logits_BV, 2)
    logits_BV = transforms.guide(logits_BV, negative_BV, knobs.guidance_B)
  if uses.constraint:
    logits_BV = constraint.allow(logits_BV, history, table, knobs.max_new_tokens_B - history.drawn_B)
  if knobs.bias_BV is not None:
    logits_BV = transforms.logit_bias(logits_BV, knobs.bias_BV)
  if uses.repetition_penalty:
    logits_BV = transforms.repetition_penalty(logits_BV, history, knobs.repetition_penalty_B)
  if uses.presence_penalty:
    logits_BV = transforms.presence_penalty(logits_BV, history, knobs.presence_penalty_B)
  if uses.frequency_penalty:
    logits_BV = transforms.frequency_penalty(logits_BV, history, knobs.frequency_penalty_B)
  if knobs.banned_BV is not None:
    logits_BV = transforms.ban(logits_BV, knobs.banned_BV)
  if uses.min_new_tokens:
    logits_BV = transforms.min_length(logits_BV, history, knobs.min_new_tokens_B, knobs.ends_BV)
  if uses.no_repeat_ngram:
    logits_BV = transforms.no_repeat_ngram(logits_BV, history, knobs.no_repeat_ngram_B)
  for transform in uses.extra:
    shape, logits_BV = logits_BV.shape, transform(logits_BV, history)
    if jnp.shape(logits_BV) != shape:
      raise errors.UserError(f'transforms: {transform} gives an array of shape {jnp.shape(logits_BV)} for logits of {shape}')
  return logits_BV


def narrow(logits_BV: jax.Array, knobs: knobs_lib.Knobs, uses: knobs_lib.Uses) -> jax.Array:
  """Adjusted logits to those of the distribution that is drawn from; a row at temperature 0 isn't drawn."""
  logits_BV = transforms.temperature(logits_BV, knobs.temperature_B)
  if uses.top_k:
    logits_BV = transforms.top_k(logits_BV, knobs.top_k_B)
  if uses.top_p:
    logits_BV = transforms.top_p(logits_BV, knobs.top_p_B)
  if uses.min_p:
    logits_BV = transforms.min_p(logits_BV, knobs.min_p_B)
  if uses.typical_p:
    logits_BV = transforms.typical_p(logits_BV, knobs.typical_p_B)
  return logits_BV


def next_token(adjusted_BV: jax.Array, uniform_B: Any, knobs: knobs_lib.Knobs, uses: knobs_lib.Uses) -> tuple[jax.Array, jax.Array | None]:
  """Each row's next token, [B], and the logits that it was drawn from; None where none is drawn, which needs no `uniform_B`."""
  greedy_B = jnp.argmax(adjusted_BV, axis=-1).astype(jnp.int32)
  if not uses.draw:
    return greedy_B, None
  narrowed_BV = narrow(adjusted_BV, knobs, uses)
  return jnp.where(knobs.temperature_B > 0, transforms.draw(narrowed_BV, uniform_B), greedy_B), narrowed_BV


def new_cache(model: base.LanguageModel, params: Any, rows: int, length: int, rewinds: int) -> Any:
  """An empty cache on the devices that hold the parameters, where later ones come from: else each call compiles twice."""
  return rows_lib.beside(params, _init_cache(model, rows, length, rewinds))


# Compiled, for else each of their many arrays is a program of its own: of 16 rows 2,229 microseconds for 832.
_init_cache = jax.jit(lambda model, *sizes: model.init_cache(*sizes), static_argnums=(0, 1, 2, 3))
grow_cache = jax.jit(lambda model, cache, length: model.grow_cache(cache, length), static_argnums=(0, 2))


@functools.partial(jax.jit, static_argnames='model', donate_argnames='cache')
def prefill(model: base.LanguageModel, params: Any, cache: Any, tokens_BT: jax.Array, valid_BT: jax.Array) -> Any:
  """The cache after tokens whose successors are known; no logits are computed."""
  return model.apply({'params': params}, tokens_BT, cache=cache, valid_BT=valid_BT)[1]


def step_model(model: base.LanguageModel, params: Any, rows: rows_lib.Rows, cache: Any, uses: knobs_lib.Uses) -> tuple[jax.Array, Any]:
  """Logits after each row's last token, [B, V], or [2 B, V] where guidance is used: the negative prompts' rows stand below."""
  token_B = rows.token_B if rows.negative_token_B is None else jnp.concatenate([rows.token_B, rows.negative_token_B])
  return base.step_in_loop(model, params, token_B, cache, 1 if uses.short else knobs_lib.SHORT)


@functools.partial(jax.jit, static_argnames=('model', 'uses', 'size'), donate_argnames=('cache', 'rows'))
def decode(
  model: base.LanguageModel, params: Any, cache: Any, rows: rows_lib.Rows, table: Any, limit: jax.Array, *, uses: knobs_lib.Uses, size: int
) -> tuple[Any, rows_lib.Rows, rows_lib.Trace, jax.Array]:
  """Draws up to `limit` tokens a row, each fed back; fewer where all rows are done.

  Args:
    model: the model.
    params: its parameters.
    cache: what stands before `rows.token_B`; donated. It has `limit` more slots.
    rows: the rows' state; donated.
    table: the rows' constraints (`constraint.Table`); None without any.
    limit: at most `size`; traced.
    uses: which settings are on; static.
    size: width of the trace; static.

  Returns:
    The cache, which lacks the last token drawn; the rows; the trace, of which the tokens
    that count are `history.drawn_B`'s gain (a row that is done draws on, and nobody looks);
    and whether every logit's row was sound, bool [B].
  """
  before_B = rows.history.drawn_B
  uniform_BT = rows_lib.uniforms(rows.knobs.key_B, before_B, size) if uses.draw else None

  def body(carry: Any) -> Any:
    i, cache, rows, trace, sound_B = carry
    logits_BV, cache = step_model(model, params, rows, cache, uses)
    uniform_B = None if uniform_BT is None else jax.lax.dynamic_index_in_dim(uniform_BT, i, axis=1, keepdims=False)
    adjusted_BV = adjust(logits_BV, rows.history, rows.knobs, uses, table)
    token_B, narrowed_BV = next_token(adjusted_BV, uniform_B, rows.knobs, uses)
    seen = rows_lib.observe(token_B, logits_BV, narrowed_BV, rows.knobs, uses)
    sound_B = sound_B & (is_sound(logits_BV[: token_B.shape[0]], adjusted_BV, uses) | rows.done_B)
    return i + 1, cache, rows_lib.advance(rows, token_B, seen.log_prob, uses, table), rows_lib.write(trace, seen, i), sound_B

  batch = rows.token_B.shape[0]
  first = (jnp.zeros((), jnp.int32), cache, rows, rows_lib.new_trace(batch, size, uses), jnp.ones((batch,), bool))
  _, cache, rows, trace, sound_B = jax.lax.while_loop(lambda carry: (carry[0] < limit) & ~carry[2].done_B.all(), body, first)
  return cache, rows, trace, sound_B


_seen: set[Any] = set()
_compiling = threading.Lock()


@contextlib.contextmanager
def compile_once(*shape: Any) -> Iterator[None]:
  """Within it one thread compiles what depends on `shape`, while the others wait: jit itself lets each of them do it."""
  if shape in _seen:
    yield
    return
  with _compiling:
    yield
    _seen.add(shape)


def is_sound(logits_BV: jax.Array, adjusted_BV: jax.Array, uses: knobs_lib.Uses) -> jax.Array:
  """Whether a token can be drawn from each row, [B]. A NaN makes the maximum NaN, and would else be drawn as token 0."""
  sound_B = jnp.isfinite(logits_BV.max(axis=-1))
  return sound_B & jnp.isfinite(adjusted_BV.max(axis=-1)) if uses.extra else sound_B  # ours leave a token


def refuse_unsound(sound_B: Any, uses: knobs_lib.Uses) -> None:
  """Raises NoGoodCheckpoint where a row's logits weren't sound."""
  if not np.asarray(sound_B).all():
    what = 'a transform leaves no token, or ' if uses.extra else ''
    raise errors.NoGoodCheckpoint(f"{what}the model gives a logit that is not a number: its parameters can't be good")


