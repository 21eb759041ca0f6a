"""The state of a batch's rows beside the model's cache: what was drawn, what decides what comes next, what is told of it."""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from textgen_jax import axes
from textgen_jax.sampling import constraint
from textgen_jax.sampling import history as history_lib
from textgen_jax.sampling import knobs as knobs_lib
from textgen_jax.sampling import params as params_lib


class Rows(NamedTuple):
  """The state of a batch's rows beside the model's cache; every leaf leads with B."""

  token_B: jax.Array  # the last known token of each row, not yet read
  negative_token_B: jax.Array | None  # and of its negative prompt, where guidance is used
  history: history_lib.History
  knobs: knobs_lib.Knobs
  done_B: jax.Array  # bool
  log_prob_B: jax.Array  # of what was drawn, under the raw distribution; 0 where log-probabilities aren't kept


def first_rows(
  params: Any,
  lines: Sequence[Sequence[int]],
  negatives: Sequence[int],
  settings: Sequence[params_lib.SamplingParams],
  key_B: Any,
  uses: knobs_lib.Uses,
  vocab: knobs_lib.Vocab,
  states: Sequence[int],
) -> Rows:
  """The state of rows of which nothing is drawn yet.

  Args:
    params: the model's parameters: what is computed stays on their devices.
    lines: ids of each row's prompt.
    negatives: the last id of each negative prompt; none without guidance.
    settings: of each row.
    key_B: key data of each row, [B, 2].
    uses: which settings are on.
    vocab: the ids that mean something.
    states: in which of the constraints' states each row begins; none without constraints.
  """
  history = history_lib.History(drawn_B=jnp.zeros(len(lines), jnp.int32))
  if uses.tokens:
    room = max(len(line) + one.max_new_tokens for line, one in zip(lines, settings, strict=True))
    tokens_BL = np.zeros((len(lines), axes.power_of_two(room, low=64)), np.int32)
    for row, line in zip(tokens_BL, lines, strict=True):
      row[: len(line)] = line
    history = history._replace(tokens_BL=jnp.asarray(tokens_BL), length_B=jnp.array([len(line) for line in lines]))
  if uses.counts:
    in_prompt_BV = jnp.asarray(history_lib.in_prompts(lines, vocab.size))
    history = history._replace(in_prompt_BV=in_prompt_BV, count_BV=jnp.zeros(in_prompt_BV.shape, jnp.int32))
  if uses.constraint:
    history = history._replace(state_B=jnp.array(states))
  rows = Rows(
    token_B=jnp.array([line[-1] for line in lines]),
    negative_token_B=jnp.array(negatives) if uses.guidance else None,
    history=history,
    knobs=knobs_lib.Knobs.of(settings, key_B, uses, vocab),
    done_B=jnp.zeros(len(lines), bool),
    log_prob_B=jnp.zeros(len(lines), jnp.float32),
  )
  return beside(params, rows)


class Trace(NamedTuple):
  """Tokens, [B, T], or [B] where they are one step's, and what is known of each; None where it wasn't asked for. Nats."""

  token: jax.Array
  log_prob: jax.Array | None = None  # under the model's own distribution
  drawn_log_prob: jax.Array | None = None  # under the one that was drawn from; 0 where the likeliest was taken
  entropy: jax.Array | None = None  # of the model's own distribution
  other: jax.Array | None = None  # the likeliest ids under it, the likeliest first, [B, T, N]
  other_log_prob: jax.Array | None = None


def new_trace(batch: int, size: int, uses: knobs_lib.Uses) -> Trace:
  trace = Trace(jnp.zeros((batch, size), jnp.int32))
  if uses.log_probs:
    zeros_BT = jnp.zeros((batch, size), jnp.float32)
    trace = trace._replace(log_prob=zeros_BT, drawn_log_prob=zeros_BT, entropy=zeros_BT)
  if uses.alternatives:
    shape = (batch, size, uses.alternatives)
    trace = trace._replace(other=jnp.zeros(shape, jnp.int32), other_log_prob=jnp.zeros(shape, jnp.float32))
  return trace


def observe(token_B: jax.Array, logits_BV: jax.Array, narrowed_BV: jax.Array | None, knobs: knobs_lib.Knobs, uses: knobs_lib.Uses) -> Trace:
  """One step's trace, without the time axis: what the model thought of each row's token."""
  if not uses.log_probs:
    return Trace(token_B)
  raw_BV = jax.nn.log_softmax(logits_BV[: token_B.shape[0]], axis=-1)
  log_prob_B = _pick(raw_BV, token_B)
  drawn_log_prob_B = jnp.zeros_like(log_prob_B)
  if narrowed_BV is not None:
    drawn_log_prob_B = jnp.where(knobs.temperature_B > 0, _pick(jax.nn.log_softmax(narrowed_BV, axis=-1), token_B), 0.0)
  entropy_B = -jnp.where(raw_BV > -jnp.inf, jnp.exp(raw_BV) * raw_BV, 0.0).sum(axis=-1)
  trace = Trace(token_B, log_prob_B, drawn_log_prob_B, entropy_B)
  if uses.alternatives:
    other_log_prob_BN, other_BN = jax.lax.top_k(raw_BV, uses.alternatives)
    trace = trace._replace(other=other_BN, other_log_prob=other_log_prob_BN)
  return trace


def _pick(x_BV: jax.Array, token_B: jax.Array) -> jax.Array:
  return jnp.take_along_axis(x_BV, token_B[:, None], axis=1)[:, 0]


def write(trace: Trace, step: Trace, i: jax.Array) -> Trace:
  """The trace with a step entered at time i."""
  put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=i, axis=1)
  return jax.tree.map(lambda whole, one: put(whole, one[:, None]), trace, step)


def uniforms(key_B: jax.Array, position_B: jax.Array, size: int) -> jax.Array:
  """What decides the tokens at `size` positions from `position_B` on, [B, size]: one number in [0, 1) each, whatever the segment."""

  def one(key: jax.Array, position: jax.Array) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(key, position))

  # All at once: within the loop, the key's arithmetic alone took longer than the model.
  return jax.vmap(lambda key, first: jax.vmap(lambda t: one(key, first + t))(jnp.arange(size)))(key_B, position_B)


def beside(params: Any, tree: Any) -> Any:
  """Arrays on the devices that hold the parameters, where what is computed from them comes to be."""
  committed = [leaf.sharding for leaf in jax.tree.leaves(params) if getattr(leaf, 'committed', False)]
  if not committed:
    return jax.tree.map(jnp.asarray, tree)
  mesh = getattr(committed[0], 'mesh', None)
  return jax.device_put(tree, committed[0] if mesh is None else jax.NamedSharding(mesh, jax.P()))


def advance(rows: Rows, token_B: jax.Array, log_prob_B: jax.Array | None, uses: knobs_lib.Uses, table: Any) -> Rows:
  """The rows after one more token each; one that was done stays as it was, but for the token that is fed to the model."""
  done_B, knobs, history = rows.done_B, rows.knobs, rows.history
  longer = follow(history, token_B, uses, table)
  if longer.state_B is not None and history.state_B is not None:
    longer = longer._replace(state_B=jnp.where(done_B, history.state_B, longer.state_B))
  longer = longer._replace(drawn_B=jnp.where(done_B, history.drawn_B, longer.drawn_B))
  ended_B = jnp.take_along_axis(knobs.ends_BV, token_B[:, None], axis=1)[:, 0] | (longer.drawn_B >= knobs.max_new_tokens_B)
  total_B = rows.log_prob_B
  if log_prob_B is not None:
    total_B = jnp.where(done_B, total_B, total_B + log_prob_B)
    ended_B = ended_B | (total_B < knobs.min_log_prob_B)
  return Rows(token_B, None if rows.negative_token_B is None else token_B, longer, knobs, done_B | ended_B, total_B)


def follow(history: history_lib.History, token_B: jax.Array, uses: knobs_lib.Uses, table: Any) -> history_lib.History:
  """The history after one more token a row, and the state of its constraint."""
  longer = history_lib.extend(history, token_B)
  return longer._replace(state_B=constraint.advance(history, table, token_B)) if uses.constraint else longer


def keys_of(prompts: Sequence[Sequence[int]], settings: Sequence[params_lib.SamplingParams], sample_indices: Sequence[int]) -> Any:
  """Each row's key data, [B, 2], by its seed, its prompt's ids and its sample index."""
  if not prompts:
    return np.zeros((0, 2), np.uint32)
  hashes = [int.from_bytes(hashlib.sha256(np.asarray(ids, '<u4').tobytes()).digest()[:4], 'little') for ids in prompts]
  seeds = np.array([one.seed for one in settings], np.uint32)
  return np.asarray(row_keys(seeds, np.array(hashes, np.uint32), np.array(sample_indices, np.uint32)))


@jax.jit
def row_keys(seed_B: jax.Array, prompt_hash_B: jax.Array, sample_B: jax.Array) -> jax.Array:
  """Key data, [B, 2], from what the row is: neither its batch nor its place in it."""

  def one(seed: jax.Array, prompt_hash: jax.Array, sample: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.PRNGKey(seed), prompt_hash), sample)

  return jax.vmap(one)(seed_B, prompt_hash_B, sample_B)
