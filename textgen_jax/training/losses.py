"""Next-token cross-entropy, with the logits of a few tokens at a time where a vocabulary is large."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from textgen_jax import backend

# Logits in float32 that one device holds at once; more of them are made and used a chunk of tokens at a time. On CPU chunks of 8 to
# 128 MiB took the same time. On accelerators they must be long: each adds to the gradient of the output layer once, and on an
# H100, by its data sheet, that takes as long as 240 tokens' products.
MOST_LOGITS_BYTES = 512 * 2**20
MOST_LOGITS_BYTES_ON_CPU = 64 * 2**20

Unembed = Callable[[jax.Array], jax.Array]  # hidden_BTD -> logits_BTV


def nll(logits_BTV: jax.Array, targets_BT: ArrayLike) -> jax.Array:
  """Negative log-likelihood of each target (nats), [B, T], in float32.

  Args:
    logits_BTV: unnormalised log-probabilities (nats); -inf where an id can't occur.
    targets_BT: ids below V.
  """
  logits_BTV = logits_BTV.astype(jnp.float32)
  target_BT = jnp.take_along_axis(logits_BTV, jnp.asarray(targets_BT)[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT


def entropy(logits_BTV: jax.Array) -> jax.Array:
  """Entropy of each predicted distribution (nats), [B, T], in float32; ids at -inf add nothing."""
  log_probs_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32), axis=-1)
  return -jnp.where(log_probs_BTV > -jnp.inf, jnp.exp(log_probs_BTV) * log_probs_BTV, 0.0).sum(axis=-1)


def measure(of_logits: Callable[[jax.Array, jax.Array], jax.Array], unembed: Unembed, hidden_BTD: jax.Array, targets_BT: Any) -> jax.Array:
  """`of_logits(unembed(hidden_BTD), targets_BT)`, whose values lead with [B, T]: forward, chunk by chunk."""
  chunks = num_chunks(unembed, hidden_BTD)
  if chunks == 1:
    return of_logits(unembed(hidden_BTD), targets_BT)
  parts = jax.lax.map(lambda part: of_logits(unembed(part[0]), part[1]), (_chunks(hidden_BTD, chunks), _chunks(targets_BT, chunks)))
  return _whole(parts, hidden_BTD.shape[1])


def weighted_nll(
  unembed: Unembed, hidden_BTD: jax.Array, targets_BT: ArrayLike, weights_BT: ArrayLike, row_ways: int = 1
) -> tuple[jax.Array, jax.Array]:
  """The weighted sum of all targets' losses, and each target's loss, [B, T] (nats).

  In chunks, the sum's gradient is computed together with it, while a chunk's logits are there: no product is
  computed twice, and what is kept are the gradients' sums. The losses by target are not computed again either, unless their
  own gradient is asked for.
  Source: Hsu et al. 2024, arXiv:2410.10989, section 3.2.

  Args:
    unembed: may close over parameters.
    hidden_BTD: what it makes logits of.
    targets_BT: ids below V.
    weights_BT: what each counts.
    row_ways: devices that rows are split over.
  """
  chunks = num_chunks(unembed, hidden_BTD, row_ways)
  if chunks == 1:
    nll_BT = nll(unembed(hidden_BTD), targets_BT)
    return (nll_BT * weights_BT).sum(), nll_BT
  hidden, targets, weights = (_grouped(_chunks(x, chunks), row_ways) for x in (hidden_BTD, targets_BT, weights_BT))
  head, params = jax.closure_convert(unembed, hidden[0, 0])
  loss, known = _sum(head, params, hidden, targets, weights)
  each = _each(head, params, hidden, targets, jax.lax.stop_gradient(known))
  return loss, _whole(each.reshape(chunks, -1, each.shape[-1]), hidden_BTD.shape[1])


def num_chunks(unembed: Unembed, hidden_BTD: jax.Array, row_ways: int = 1) -> int:
  """In how many chunks of equal length, along T, the logits are few enough. Rows stay whole, and where they are."""
  rows, time, vocab = jax.eval_shape(unembed, hidden_BTD).shape
  return math.ceil(time / chunk_length(math.ceil(rows / row_ways), vocab))


def chunk_length(rows: int, vocab: int) -> int:
  """At most so many tokens of each of a device's `rows` have their logits at once."""
  most_bytes = MOST_LOGITS_BYTES_ON_CPU if backend.name() == 'cpu' else MOST_LOGITS_BYTES
  return max(1, most_bytes // (4 * rows * vocab))


def _chunks(x_BT: Any, chunks: int) -> jax.Array:
  """[B, T, ...] as [chunks, B, T / chunks, ...], with zeros behind the last token."""
  size = math.ceil(x_BT.shape[1] / chunks)
  x_BT = jnp.pad(x_BT, ((0, 0), (0, chunks * size - x_BT.shape[1]), *((0, 0),) * (x_BT.ndim - 2)))
  return x_BT.reshape(x_BT.shape[0], chunks, size, *x_BT.shape[2:]).swapaxes(0, 1)


def _grouped(chunks: jax.Array, row_ways: int) -> jax.Array:
  """Rows of one device together: [chunks, row_ways, B / row_ways, T / chunks, ...]."""
  return chunks.reshape(chunks.shape[0], row_ways, -1, *chunks.shape[2:])


def _whole(chunks: jax.Array, time: int) -> jax.Array:
  return chunks.swapaxes(0, 1).reshape(chunks.shape[1], -1, *chunks.shape[3:])[:, :time]


def _with_gradient(function: Any, forward: Any, backward: Any) -> Any:
  """`function`, whose first argument is a function itself, with a gradient of our own."""
  differentiable = jax.custom_vjp(function, nondiff_argnums=(0,))
  differentiable.defvjp(forward, backward)
  return differentiable


def _sum_alone(head: Any, params: Any, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The loss, and each target's, of what is in chunks and grouped; such arrays bear no suffix."""
  one_group = jax.vmap(lambda hidden_BTD, targets_BT: nll(head(hidden_BTD, *params), targets_BT))
  losses = jax.lax.map(lambda chunk: one_group(*chunk), (hidden, targets))
  return (losses * weights).sum(), losses


def _sum_forward(head: Any, params: Any, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[Any, Any]:
  losses, grads = _gradients(head, params, hidden, targets, weights)
  return ((losses * weights).sum(), losses), (*grads, losses)


def _sum_backward(head: Any, saved: Any, pull: tuple[jax.Array, jax.Array]) -> Any:
  del head
  params, hidden, losses = jax.tree.map(lambda x: (pull[0] * x).astype(x.dtype), saved)
  return params, hidden, None, losses


def _each_alone(head: Any, params: Any, hidden: jax.Array, targets: jax.Array, known: jax.Array) -> jax.Array:
  """Each target's loss, which is known; only its gradient has to be worked for."""
  del head, params, hidden, targets
  return known


def _each_forward(head: Any, params: Any, hidden: jax.Array, targets: jax.Array, known: jax.Array) -> tuple[jax.Array, Any]:
  del head
  return known, (params, hidden, targets)


def _each_backward(head: Any, saved: Any, pull: jax.Array) -> Any:
  params, hidden, targets = saved
  _, grads = _gradients(head, params, hidden, targets, pull)
  return *grads, None, None


def _gradients(head: Any, params: Any, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, Any]:
  """Each target's loss, and the gradient of their weighted sum with regard to params and hidden states.

  Each group of rows has params and sums of its own, so that devices meet once, when all chunks are done. Left to itself, XLA
  has them meet in each chunk, over the parameters' whole gradient or all rows' logits.
  """

  def one_group(params: Any, hidden_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
    logits_BTV, pull = jax.vjp(lambda params, hidden_BTD: head(hidden_BTD, *params), params, hidden_BTD)
    log_total_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    is_target_BTV = targets_BT[..., None] == jnp.arange(logits_BTV.shape[-1])
    grads, hidden_grads = pull(weights_BT[..., None] * (jnp.exp(logits_BTV - log_total_BT[..., None]) - is_target_BTV))
    return grads, log_total_BT - target_BT, hidden_grads

  def one_chunk(totals: Any, chunk: Any) -> tuple[Any, list[jax.Array]]:
    grads, *values = jax.vmap(one_group)(copies, *chunk)
    return jax.tree.map(jnp.add, totals, grads), values

  copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (hidden.shape[1], *x.shape)), params)
  totals, (losses, hidden_grads) = jax.lax.scan(one_chunk, jax.tree.map(jnp.zeros_like, copies), (hidden, targets, weights))
  return losses, (jax.tree.map(lambda x: x.sum(axis=0), totals), hidden_grads)


_sum = _with_gradient(_sum_alone, _sum_forward, _sum_backward)
_each = _with_gradient(_each_alone, _each_forward, _each_backward)
