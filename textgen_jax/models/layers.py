"""Layers that both model families use: 2-D products, embeddings, vocabulary padding."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from textgen_jax import axes, backend
from textgen_jax.models import base, products

Initializer = Callable[..., jax.Array]

MASKED = -1e30  # a score that is not to count; finite, so that a row with nothing to look at gives no NaN
RESIDUAL = (axes.BATCH, axes.TIME, None)  # logical axes of activations, [B, T, D]


def partitioned(init: Initializer, *names: str | None) -> Any:
  """An initializer whose parameter bears the names of its axes (`axes.py`)."""
  return nn.with_logical_partitioning(init, names)


class Dense(nn.Module):
  """`x @ kernel + bias` over the last axis, with a 2-D kernel in the shape [in, out].

  All other axes are flattened for the product: in three dimensions XLA's CPU backend
  transposes activations for the weights' gradients inside slow fused loops, which
  took 57 ms where this took 42 for one small training step.
  """

  features: int
  names: tuple[str, str]  # logical axes of the kernel
  kernel_init: Initializer
  use_bias: bool = False
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param('kernel', partitioned(self.kernel_init, *self.names), (x.shape[-1], self.features))
    y = products.dense(x.reshape(-1, x.shape[-1]).astype(self.dtype), kernel.astype(self.dtype))
    if self.use_bias:
      bias = self.param('bias', partitioned(nn.initializers.zeros, self.names[1]), (self.features,))
      y = y + bias.astype(self.dtype)
    return y.reshape(*x.shape[:-1], self.features)


class Embed(nn.Module):
  """A table of vectors: looked up by id, or multiplied as a tied output layer."""

  size: int
  dim: int
  axis: str  # logical axis of the rows
  embedding_init: Initializer
  dtype: str = 'float32'
  constrain: base.Constrain = base.unconstrained

  def setup(self) -> None:
    init = partitioned(self.embedding_init, self.axis, axes.EMBED)
    self.embedding = self.param('embedding', init, (self.size, self.dim))

  def __call__(self, ids: jax.Array) -> jax.Array:
    # Whole along D first: looked-up rows that lie in parts XLA makes whole by copying all of them to all devices.
    return jnp.take(self.constrain(self.embedding, (self.axis, None)), ids, axis=0).astype(self.dtype)

  def attend(self, x: jax.Array) -> jax.Array:
    y = products.dense_transposed(x.reshape(-1, self.dim).astype(self.dtype), self.embedding.astype(self.dtype))
    return y.reshape(*x.shape[:-1], self.size)


def layer_norm(name: str | None, *, use_bias: bool, dtype: str) -> nn.LayerNorm:
  """Source: Ba et al. 2016, arXiv:1607.06450; epsilon as in GPT-2."""
  return nn.LayerNorm(
    epsilon=1e-5,
    use_bias=use_bias,
    dtype=dtype,
    scale_init=partitioned(nn.initializers.ones, axes.EMBED),
    bias_init=partitioned(nn.initializers.zeros, axes.EMBED),
    name=name,
  )


def rms_norm(name: str | None, *, axis: str | None, dtype: str) -> nn.RMSNorm:
  """Source: Zhang & Sennrich 2019, arXiv:1910.07467; epsilon as in Llama."""
  scale_init = partitioned(nn.initializers.ones, axis)
  return nn.RMSNorm(epsilon=1e-5, dtype=dtype, scale_init=scale_init, name=name)


def padded_size(vocab_size: int, multiple: int) -> int:
  return math.ceil(vocab_size / multiple) * multiple


def hide_padding(logits_BTV: jax.Array, vocab_size: int) -> jax.Array:
  """Logits in float32, -inf where an id only pads the vocabulary."""
  logits_BTV = logits_BTV.astype(jnp.float32)
  if logits_BTV.shape[-1] == vocab_size:
    return logits_BTV
  return jnp.where(jnp.arange(logits_BTV.shape[-1]) < vocab_size, logits_BTV, -jnp.inf)


def soft_cap(logits_BTV: jax.Array, cap: float) -> jax.Array:
  """Logits in (-cap, cap), in float32; small ones nearly as they are. Source: Gemma Team 2024, arXiv:2408.00118, section 2."""
  return cap * jnp.tanh(logits_BTV.astype(jnp.float32) / cap)


def resolve_dtype(name: str) -> str:
  """'auto' is bfloat16 where the hardware has it, float32 on CPU, where bfloat16 was the slower one."""
  if name != 'auto':
    return name
  return 'float32' if backend.name() == 'cpu' else 'bfloat16'
