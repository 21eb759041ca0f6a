"""The compiled parts of generation: reading a prompt, and a loop that draws a segment of tokens."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from textgen_jax.models import base
from textgen_jax.sampling import params as params_lib
from textgen_jax.sampling import transforms


class Knobs(NamedTuple):
  """Sampling settings, one a row; all traced, so that another value compiles nothing."""

  temperature_B: jax.Array
  top_k_B: jax.Array
  top_p_B: jax.Array
  min_p_B: jax.Array
  bans_unknown_B: jax.Array  # bool
  key_B: jax.Array  # uint32 key data, [B, 2]; the row's own, whatever its place

  @classmethod
  def of(cls, rows: Sequence[params_lib.SamplingParams], keys: Any) -> 'Knobs':
    def gather(name: str, dtype: Any) -> Any:
      return np.array([getattr(row, name) for row in rows], dtype)

    temperature = gather('temperature', np.float64)
    return cls(
      # Draws are argmax below 1e-30 and uniform above 1e30 as it is; further out float32 has no reciprocal, and 0 * -inf is NaN.
      jnp.asarray(np.where(temperature > 0, np.clip(temperature, 1e-30, 1e30), 0.0), jnp.float32),
      gather('top_k', np.int32),
      gather('top_p', np.float32),
      gather('min_p', np.float32),
      ~gather('allow_unknown', np.bool_),
      keys,
    )


class Uses(NamedTuple):
  """Which transforms any row needs; the others are compiled out."""

  draw: bool
  top_k: bool
  top_p: bool
  min_p: bool
  unknown: int | None = None  # the id that some row mustn't draw

  @classmethod
  def of(cls, rows: Sequence[params_lib.SamplingParams], unknown: int | None = None) -> 'Uses':
    drawn = [row for row in rows if row.temperature > 0]
    return cls(
      draw=bool(drawn),
      top_k=any(row.top_k > 0 for row in drawn),
      top_p=any(row.top_p < 1 for row in drawn),
      min_p=any(row.min_p > 0 for row in drawn),
      unknown=None if all(row.allow_unknown for row in rows) else unknown,
    )


def next_token(logits_BV: jax.Array, position_B: jax.Array, knobs: Knobs, uses: Uses) -> jax.Array:
  """Each row's next token, [B].

  Args:
    logits_BV: unnormalised log-probabilities (nats).
    position_B: how many tokens the row has drawn before: its key's last ingredient.
    knobs: the rows' settings.
    uses: which of them are on in any row.
  """
  if uses.unknown is not None:
    logits_BV = logits_BV.at[:, uses.unknown].set(jnp.where(knobs.bans_unknown_B, -jnp.inf, logits_BV[:, uses.unknown]))
  greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  if not uses.draw:
    return greedy_B
  logits_BV = transforms.temperature(logits_BV, knobs.temperature_B)
  if uses.top_k:
    logits_BV = transforms.top_k(logits_BV, knobs.top_k_B)
  if uses.top_p:
    logits_BV = transforms.top_p(logits_BV, knobs.top_p_B)
  if uses.min_p:
    logits_BV = transforms.min_p(logits_BV, knobs.min_p_B)
  uniform_B = jax.vmap(lambda key, position: jax.random.uniform(jax.random.fold_in(key, position)))(knobs.key_B, position_B)
  return jnp.where(knobs.temperature_B > 0, transforms.draw(logits_BV, uniform_B), greedy_B)


def new_cache(model: base.LanguageModel, params: Any, rows: int, length: int) -> Any:
  """An empty cache on the devices that hold the parameters, where later ones come from: else each call compiles twice."""
  cache = model.init_cache(rows, length)
  committed = [leaf.sharding for leaf in jax.tree.leaves(params) if getattr(leaf, 'committed', False)]
  if not committed:
    return cache
  mesh = getattr(committed[0], 'mesh', None)
  return jax.device_put(cache, committed[0] if mesh is None else jax.NamedSharding(mesh, jax.P()))


@functools.partial(jax.jit, static_argnames='model', donate_argnames='cache')
def prefill(model: base.LanguageModel, params: Any, cache: Any, tokens_BT: jax.Array, valid_BT: jax.Array) -> Any:
  """The cache after tokens whose successors are known; no logits are computed."""
  return model.apply({'params': params}, tokens_BT, cache=cache, valid_BT=valid_BT)[1]


@functools.partial(jax.jit, static_argnames=('model', 'uses', 'size'), donate_argnames='cache')
def decode(
  model: base.LanguageModel,
  params: Any,
  cache: Any,
  token_B: jax.Array,
  position_B: jax.Array,
  knobs: Knobs,
  limit: jax.Array,
  *,
  uses: Uses,
  size: int,
) -> tuple[Any, jax.Array]:
  """Draws `limit` tokens a row, each fed back.

  Args:
    model: the model.
    params: its parameters.
    cache: what stands before `token_B`; donated. It has `limit` more slots.
    token_B: the last known token of each row, not yet read.
    position_B: tokens that the row has drawn so far.
    knobs: the rows' settings.
    limit: at most `size`; traced.
    uses: which settings are on; static.
    size: width of the result; static.

  Returns:
    The cache, which lacks the last token drawn, and the tokens, [B, size], 0 past `limit`.
  """

  def body(carry: Any) -> Any:
    i, cache, token_B, drawn_BT = carry
    hidden_BTD, cache = model.apply({'params': params}, token_B[:, None], cache=cache)
    logits_BV = model.apply({'params': params}, hidden_BTD, method='unembed')[:, 0]
    token_B = next_token(logits_BV, position_B + i, knobs, uses)
    return i + 1, cache, token_B, jax.lax.dynamic_update_slice_in_dim(drawn_BT, token_B[:, None], i, axis=1)

  drawn_BT = jnp.zeros((token_B.shape[0], size), jnp.int32)
  first = (jnp.zeros((), jnp.int32), cache, token_B, drawn_BT)
  _, cache, _, drawn_BT = jax.lax.while_loop(lambda carry: carry[0] < limit, body, first)
  return cache, drawn_BT


@jax.jit
def row_keys(seed_B: jax.Array, prompt_hash_B: jax.Array, sample_B: jax.Array) -> jax.Array:
  """Key data, [B, 2], from what the row is: neither its batch nor its place in it."""

  def one(seed: jax.Array, prompt_hash: jax.Array, sample: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.PRNGKey(seed), prompt_hash), sample)

  return jax.vmap(one)(seed_B, prompt_hash_B, sample_B)
