"""Next-token cross-entropy."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


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
