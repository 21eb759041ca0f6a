"""The compiled parts of generation: reading a prompt, and a loop that draws a segment of tokens."""

import contextlib
import functools
import hashlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from textgen_jax import axes, errors
from textgen_jax.models import base
from textgen_jax.sampling import constraint, transforms
from textgen_jax.sampling import history as history_lib
from textgen_jax.sampling import knobs as knobs_lib
from textgen_jax.sampling import params as params_lib


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


def new_cache(model: base.LanguageModel, params: Any, rows: int, length: int, rewinds: int = 0) -> Any:
  """An empty cache on the devices that hold the parameters, where later ones come from: else each call compiles twice."""
  return beside(params, model.init_cache(rows, length, rewinds))


def beside(params: Any, tree: Any) -> Any:
  """Arrays on the devices that hold the parameters, where what is computed from them comes to be."""
  committed = [leaf.sharding for leaf in jax.tree.leaves(params) if getattr(leaf, 'committed', False)]
  if not committed:
    return jax.tree.map(jnp.asarray, tree)
  mesh = getattr(committed[0], 'mesh', None)
  return jax.device_put(tree, committed[0] if mesh is None else jax.NamedSharding(mesh, jax.P()))


@functools.partial(jax.jit, static_argnames='model', donate_argnames='cache')
def prefill(model: base.LanguageModel, params: Any, cache: Any, tokens_BT: jax.Array, valid_BT: jax.Array) -> Any:
  """The cache after tokens whose successors are known; no logits are computed."""
  return model.apply({'params': params}, tokens_BT, cache=cache, valid_BT=valid_BT)[1]


def step_model(model: base.LanguageModel, params: Any, rows: Rows, cache: Any) -> tuple[jax.Array, Any]:
  """Logits after each row's last token, [B, V], or [2 B, V] where guidance is used: the negative prompts' rows stand below."""
  token_B = rows.token_B if rows.negative_token_B is None else jnp.concatenate([rows.token_B, rows.negative_token_B])
  hidden_BTD, cache = model.apply({'params': params}, token_B[:, None], cache=cache)
  return model.apply({'params': params}, hidden_BTD, method='unembed')[:, 0], cache


def decode(
  model: base.LanguageModel, params: Any, cache: Any, rows: Rows, table: Any, limit: jax.Array, *, uses: knobs_lib.Uses, size: int
) -> tuple[Any, Rows, Trace, jax.Array]:
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
  return compiled()(model, params, cache, rows, table, limit, uses=uses, size=size)


@functools.cache
def compiled() -> Any:
  """`decode` for this process's backend."""
  return jax.jit(_decode, static_argnames=('model', 'uses', 'size'), donate_argnames=('cache', 'rows'), compiler_options=_options())


def _options() -> dict[str, bool]:
  """With it XLA's CPU backend copies the cache of a lone row less often: 264 microseconds a token for 352 (4 layers, 320 slots)."""
  options = {'xla_cpu_copy_insertion_use_region_analysis': True}
  if jax.default_backend() != 'cpu':
    return {}
  try:
    jax.jit(lambda x: x, compiler_options=options)(0)
  except RuntimeError:  # an XLA that doesn't know it
    return {}
  return options


def _decode(
  model: base.LanguageModel, params: Any, cache: Any, rows: Rows, table: Any, limit: jax.Array, *, uses: knobs_lib.Uses, size: int
) -> tuple[Any, Rows, Trace, jax.Array]:
  before_B = rows.history.drawn_B
  uniform_BT = uniforms(rows.knobs.key_B, before_B, size) if uses.draw else None

  def body(carry: Any) -> Any:
    i, cache, rows, trace, sound_B = carry
    logits_BV, cache = step_model(model, params, rows, cache)
    uniform_B = None if uniform_BT is None else jax.lax.dynamic_index_in_dim(uniform_BT, i, axis=1, keepdims=False)
    adjusted_BV = adjust(logits_BV, rows.history, rows.knobs, uses, table)
    token_B, narrowed_BV = next_token(adjusted_BV, uniform_B, rows.knobs, uses)
    seen = observe(token_B, logits_BV, narrowed_BV, rows.knobs, uses)
    sound_B = sound_B & (is_sound(logits_BV[: token_B.shape[0]], adjusted_BV, uses) | rows.done_B)
    return i + 1, cache, advance(rows, token_B, seen.log_prob, uses, table), write(trace, seen, i), sound_B

  batch = rows.token_B.shape[0]
  first = (jnp.zeros((), jnp.int32), cache, rows, new_trace(batch, size, uses), jnp.ones((batch,), bool))
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
