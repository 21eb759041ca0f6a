"""Beam search: the likeliest whole texts, looked for K at a time.

Source: Graves 2012, arXiv:1211.3711, section 2.4; score = log-probability / tokens ** length_penalty as in Hugging Face
transformers (Wu et al. 2016, arXiv:1609.08144, section 7, divide by ((5 + tokens) / 6) ** alpha).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from textgen_jax import axes
from textgen_jax.models import base
from textgen_jax.sampling import constraint, decode, reader
from textgen_jax.sampling import knobs as knobs_lib
from textgen_jax.sampling import params as params_lib
from textgen_jax.sampling import rows as rows_lib

DEAD = -jnp.inf  # the log-probability of a beam that isn't there


class Beams(NamedTuple):
  """K live beams of each of B prompts, in N = B K lines, and the best K that have ended; every leaf leads with B or N."""

  rows: rows_lib.Rows  # of the live ones; `log_prob_B` is what they are ranked by
  trace: rows_lib.Trace  # [N, L]
  ended: rows_lib.Trace  # [N, L]
  length_BK: jax.Array  # tokens of those that have ended
  score_BK: jax.Array  # theirs, the best first; DEAD: there is none yet
  finished_B: jax.Array  # no live beam can end up among the best K


class Hypothesis(NamedTuple):
  """A text that ended, with the trace of its tokens (`rows_lib.Trace`, [1, T]) and its score."""

  trace: rows_lib.Trace
  score: float


def search(
  model: base.LanguageModel,
  params: Any,
  prompts: Sequence[Sequence[int]],
  settings: Sequence[params_lib.SamplingParams],
  vocab: knobs_lib.Vocab,
  *,
  negatives: Sequence[Sequence[int]] | None = None,
  table: constraint.Table | None = None,
  states: Sequence[int] = (),
  transforms: Sequence[knobs_lib.Transform] = (),
) -> list[list[Hypothesis]]:
  """The best texts of each prompt, the best first; all have the same `num_beams`, K. See `sampler.Sampler` for the arguments.

  Raises:
    NoGoodCheckpoint: a logit isn't a number.
  """
  size = settings[0].num_beams
  uses = knobs_lib.Uses.of(settings, vocab, transforms)
  owners = [b for b in range(len(prompts)) for _ in range(size)]
  begun = [list(prompts[b]) for b in owners]
  others = [list(negatives[b]) for b in owners] if negatives is not None and uses.guidance else []
  read = reader.Reader(model, params, begun + others)
  table = None if table is None else rows_lib.beside(params, table)
  each = [settings[b] for b in owners]
  keys = np.zeros((len(owners), 2), np.uint32)  # nothing is drawn
  rows = rows_lib.first_rows(
    params, begun, [line[-1] for line in others], each, keys, uses, vocab, [states[b] for b in owners] if uses.constraint else []
  )
  done, longest = 0, max(one.max_new_tokens for one in settings)
  beams = rows_lib.beside(params, _begin(rows, size, longest, uses))
  penalty_B = np.array([one.length_penalty for one in settings], np.float32)
  while done < longest and not np.asarray(beams.finished_B).all():
    if read.cache is None or read.room() == 0:
      read.read(longest - done, reader.SEGMENT)
    limit = min(reader.SEGMENT, longest - done, read.room() or reader.SEGMENT)
    read.reserve(limit)
    read.cache, beams, sound_N = extend(
      model, params, read.cache, beams, table, penalty_B, np.int32(done), np.int32(limit), uses=uses, size=size
    )
    done += limit
    decode.refuse_unsound(sound_N, uses)
    drawn = np.asarray(beams.trace.token)[:, :done].tolist()
    read.lines = [line + new for line, new in zip([*begun, *others], drawn * (2 if others else 1), strict=True)]
  return _hypotheses(jax.device_get(beams), size)


def _begin(rows: rows_lib.Rows, size: int, longest: int, uses: knobs_lib.Uses) -> Beams:
  """One live beam a prompt, without a token."""
  lines = rows.token_B.shape[0]
  blank = rows_lib.new_trace(lines, axes.power_of_two(longest, low=32), uses)
  trace, ended = jax.tree.map(jnp.copy, (blank, blank))  # a buffer each: one can't be donated twice
  first_N = jnp.where(jnp.arange(lines) % size == 0, 0.0, DEAD)
  rows, shape = rows._replace(log_prob_B=first_N), (lines // size, size)
  return Beams(rows, trace, ended, jnp.zeros(shape, jnp.int32), jnp.full(shape, DEAD), jnp.zeros(shape[0], bool))


@functools.partial(jax.jit, static_argnames=('model', 'uses', 'size'), donate_argnames=('cache', 'beams'))
def extend(
  model: base.LanguageModel,
  params: Any,
  cache: Any,
  beams: Beams,
  table: Any,
  penalty_B: jax.Array,
  done: jax.Array,
  limit: jax.Array,
  *,
  uses: knobs_lib.Uses,
  size: int,
) -> tuple[Any, Beams, jax.Array]:
  """Up to `limit` more tokens; fewer where all searches are finished.

  Args:
    model: the model.
    params: its parameters.
    cache: what stands before each live beam's last token, the negative prompts' below; donated. It has `limit` more slots.
    beams: the searches; donated.
    table: constraints (`constraint.Table`); None without any.
    penalty_B: the power of the length that scores are divided by.
    done: how many tokens the live beams have.
    limit: traced.
    uses: which settings are on; static.
    size: K; static.

  Returns:
    The cache, which lacks the live beams' last tokens; the searches; and whether all logits were sound, bool [N].
  """

  def body(carry: Any) -> Any:
    i, cache, beams, sound_N = carry
    logits_NV, cache = decode.step_model(model, params, beams.rows, cache, uses)
    adjusted_NV = decode.adjust(logits_NV, beams.rows.history, beams.rows.knobs, uses, table)
    alive_N = beams.rows.log_prob_B > DEAD
    sound_N = sound_N & (decode.is_sound(logits_NV[: alive_N.size], adjusted_NV, uses) | ~alive_N | jnp.repeat(beams.finished_B, size))
    beams, parent_N = step(beams, logits_NV, adjusted_NV, table, penalty_B, i, uses)
    # The negative prompts' lines stand below.
    lines = parent_N if beams.rows.negative_token_B is None else jnp.concatenate([parent_N, parent_N + parent_N.size])
    return i + 1, base.reorder_cache(cache, lines), beams, sound_N

  first = (done, cache, beams, jnp.ones(beams.rows.token_B.shape, bool))
  _, cache, beams, sound_N = jax.lax.while_loop(lambda carry: (carry[0] < done + limit) & ~carry[2].finished_B.all(), body, first)
  return cache, beams, sound_N


def step(
  beams: Beams, logits_NV: jax.Array, adjusted_NV: jax.Array, table: Any, penalty_B: jax.Array, i: jax.Array, uses: knobs_lib.Uses
) -> tuple[Beams, jax.Array]:
  """The searches after token `i` of all live beams, and which line each of them goes on from, [N]."""
  rows, trace, (batch, size) = beams.rows, beams.trace, beams.score_BK.shape
  vocab = adjusted_NV.shape[1]
  alive_N1 = (rows.log_prob_B > DEAD)[:, None]
  total_NV = jnp.where(alive_N1, rows.log_prob_B[:, None] + jax.nn.log_softmax(jnp.where(alive_N1, adjusted_NV, 0.0), axis=-1), DEAD)
  last_NV = rows.knobs.ends_BV | (i + 1 >= rows.knobs.max_new_tokens_B)[:, None]

  def best(total_NV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    total_BK, place_BK = jax.lax.top_k(total_NV.reshape(batch, size * vocab), size)
    return total_BK, (place_BK // vocab + jnp.arange(batch)[:, None] * size).reshape(-1), (place_BK % vocab).reshape(-1)

  def longer(parent_N: jax.Array, token_N: jax.Array) -> rows_lib.Trace:
    seen = rows_lib.observe(token_N, logits_NV[parent_N], None, rows.knobs, uses)
    return rows_lib.write(jax.tree.map(lambda leaf: leaf[parent_N], trace), seen, i)

  ended_BK, parent_N, token_N = best(jnp.where(last_NV, total_NV, DEAD))
  score_BK = ended_BK / (i + 1).astype(jnp.float32) ** penalty_B[:, None]
  beams = _enter(beams, score_BK, longer(parent_N, token_N), i + 1)
  live_BK, parent_N, token_N = best(jnp.where(last_NV, DEAD, total_NV))
  rows = rows._replace(
    token_B=token_N,
    negative_token_B=None if rows.negative_token_B is None else token_N,
    history=rows_lib.follow(jax.tree.map(lambda leaf: leaf[parent_N], rows.history), token_N, uses, table),
    log_prob_B=live_BK.reshape(-1),
  )
  # Log-probability only falls: a live beam scores best where it ends with its next token, or at the limit if length is rewarded.
  most_B = rows.knobs.max_new_tokens_B.reshape(batch, size)[:, 0].astype(jnp.float32)
  hope_B = live_BK[:, 0] / jnp.maximum((i + 2) ** penalty_B, most_B**penalty_B)
  finished_B = beams.finished_B | (live_BK[:, 0] == DEAD) | (hope_B <= beams.score_BK[:, -1])
  return beams._replace(rows=rows, trace=longer(parent_N, token_N), finished_B=finished_B), parent_N


def _enter(beams: Beams, score_BK: jax.Array, trace: rows_lib.Trace, length: jax.Array) -> Beams:
  """Keeps the best K of those that had ended and those that now do; nothing changes where a search is finished."""
  batch, size = score_BK.shape
  score_BK = jnp.where(beams.finished_B[:, None], DEAD, score_BK)
  best_BK, place_BK = jax.lax.top_k(jnp.concatenate([beams.score_BK, score_BK], axis=1), size)

  def pick(old: jax.Array, new: jax.Array) -> jax.Array:
    both = jnp.concatenate([old.reshape(batch, size, *old.shape[1:]), new.reshape(batch, size, *new.shape[1:])], axis=1)
    index = place_BK.reshape(batch, size, *(1,) * (both.ndim - 2))
    return jnp.take_along_axis(both, index, axis=1).reshape(old.shape)

  lengths = jnp.concatenate([beams.length_BK, jnp.full_like(beams.length_BK, length)], axis=1)
  return beams._replace(
    ended=jax.tree.map(pick, beams.ended, trace), length_BK=jnp.take_along_axis(lengths, place_BK, axis=1), score_BK=best_BK
  )


def _hypotheses(beams: Beams, size: int) -> list[list[Hypothesis]]:
  found = []
  for b, (scores, lengths) in enumerate(zip(beams.score_BK, beams.length_BK, strict=True)):
    lines = [
      Hypothesis(jax.tree.map(lambda leaf, n=b * size + k, end=end: leaf[n : n + 1, :end], beams.ended), float(score))
      for k, (score, end) in enumerate(zip(scores, lengths, strict=True))
      if score > DEAD
    ]
    found.append(lines)
  return found
