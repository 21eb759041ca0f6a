"""Causal self-attention, with and without a cache of keys and values.

A variant subclasses `Attention`, overrides `mix`, and gets a line in `build.ATTENTIONS`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from textgen_jax import axes
from textgen_jax.models import attention_kernels, base, causal_attention, layers, rope


class Frame(NamedTuple):
  """Where the tokens of one call stand; the same for every layer."""

  position_BT: jax.Array | np.ndarray  # in the token's document, from 0
  mask_BTS: jax.Array  # True where a query may look; B may be 1
  cursor: jax.Array | None  # the slot that the call's first token is written to; None without a cache
  rotation: rope.Rotation | None = None  # of queries and keys; None where positions are learned
  sight: attention_kernels.Sight | None = None  # the same mask as a rule, where there is one that kernels know


class Attention(nn.Module):
  """Softmax attention of H query heads over G groups of keys and values.

  Source: Vaswani et al. 2017, arXiv:1706.03762; groups: Ainslie et al. 2023,
  arXiv:2305.13245; query/key norm: Dehghani et al. 2023, arXiv:2302.05442.
  """

  config: Any  # TransformerConfig
  dtype: str
  kernel_init: layers.Initializer
  output_init: layers.Initializer
  constrain: base.Constrain = base.unconstrained

  @nn.compact
  def __call__(self, x_BTD: jax.Array, frame: Frame, cache: Any, deterministic: bool) -> tuple[jax.Array, Any]:
    c = self.config
    batch, time = x_BTD.shape[:2]
    head_dim = c.dim // c.num_heads
    groups = c.num_kv_heads or c.num_heads

    def project(name: str, heads: int) -> jax.Array:
      y = layers.Dense(heads * head_dim, (axes.EMBED, axes.HEADS), self.kernel_init, c.bias, self.dtype, name=name)(x_BTD)
      return self.constrain(y.reshape(batch, time, heads, head_dim), (axes.BATCH, axes.TIME, axes.HEADS, None))

    q_BTHK, k_BTGK, v_BTGK = project('query', c.num_heads), project('key', groups), project('value', groups)
    if c.qk_norm:
      q_BTHK = layers.rms_norm('query_norm', axis=None, dtype=self.dtype)(q_BTHK)
      k_BTGK = layers.rms_norm('key_norm', axis=None, dtype=self.dtype)(k_BTGK)
    if frame.rotation is not None:
      q_BTHK, k_BTGK = rope.rotate(q_BTHK, frame.rotation), rope.rotate(k_BTGK, frame.rotation)
    k_BGSK, v_BGSK = (x.swapaxes(1, 2) for x in (k_BTGK, v_BTGK))
    if cache is not None:
      assert frame.cursor is not None
      cache = tuple(write_slots(old, new, frame.cursor, axis=2) for old, new in zip(cache, (k_BGSK, v_BGSK), strict=True))
      k_BGSK, v_BGSK = cache
    y_BTHK = self.mix_by_kernel(q_BTHK, k_BGSK, v_BGSK, frame, deterministic)
    y = y_BTHK.reshape(batch, time, c.dim)
    return layers.Dense(c.dim, (axes.HEADS, axes.EMBED), self.output_init, c.bias, self.dtype, name='output')(y), cache

  def mix_by_kernel(self, q_BTHK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, frame: Frame, deterministic: bool) -> jax.Array:
    """`mix`, or what equals it without holding all weights at once. A variant's own mathematics is never passed over."""
    dropout = 0.0 if deterministic else self.config.attention_dropout
    changed = has_own_mathematics(type(self))
    how = (q_BTHK, k_BGSK, frame.sight, self.constrain)
    kernel = attention_kernels.choose(self.config.attention_kernel, *how, dropout=dropout, changed=changed)
    if kernel == 'plain' or frame.sight is None:
      return self.mix(q_BTHK, k_BGSK, v_BGSK, frame.mask_BTS, deterministic)
    if kernel == 'causal':
      return causal_attention.attend(q_BTHK, k_BGSK, v_BGSK)
    if kernel == 'blocks':
      key = self.make_rng('dropout') if dropout else None
      return attention_kernels.blocks(q_BTHK, k_BGSK, v_BGSK, frame.sight, dropout, key)
    return attention_kernels.apply(kernel, q_BTHK, k_BGSK, v_BGSK, frame.sight, self.constrain)

  def mix(self, q_BTHK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, mask_BTS: jax.Array, deterministic: bool) -> jax.Array:
    """What each query draws from the values it may look at, [B, T, H, K]."""
    p_BHTS = jax.nn.softmax(self.scores(q_BTHK, k_BGSK, mask_BTS), axis=-1)
    return self.collect(p_BHTS, v_BGSK, deterministic)

  def scores(self, q_BTHK: jax.Array, k_BGSK: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Scaled products in float32, `layers.MASKED` where a query may not look, [B, H, T, S]."""
    batch, time, heads, head_dim = q_BTHK.shape
    groups = k_BGSK.shape[1]
    # The heads that share a group of keys are queries of one product (R of them), so that no key is copied.
    q_BTGRK = (q_BTHK * head_dim**-0.5).reshape(batch, time, groups, heads // groups, head_dim)
    s_BGRTS = jnp.einsum('BTGRK,BGSK->BGRTS', q_BTGRK, k_BGSK, preferred_element_type=jnp.float32)
    return jnp.where(mask_BTS[:, None], s_BGRTS.reshape(batch, heads, time, -1), layers.MASKED)

  def collect(self, p_BHTS: jax.Array, v_BGSK: jax.Array, deterministic: bool) -> jax.Array:
    """Values summed by weight, after the weights' dropout, [B, T, H, K]."""
    p_BHTS = nn.Dropout(self.config.attention_dropout, name='dropout')(p_BHTS, deterministic=deterministic)
    batch, heads, time, size = p_BHTS.shape
    groups = v_BGSK.shape[1]
    p_BGRTS = p_BHTS.astype(v_BGSK.dtype).reshape(batch, groups, heads // groups, time, size)
    return jnp.einsum('BGRTS,BGSK->BTGRK', p_BGRTS, v_BGSK).reshape(batch, time, heads, -1)


def has_own_mathematics(attention_class: type[nn.Module]) -> bool:
  """Whether a variant changes what kernels would compute in one go."""
  return any(getattr(attention_class, name) is not getattr(Attention, name) for name in ('mix', 'scores', 'collect'))


def write_slots(buffer: jax.Array, new: jax.Array, cursor: jax.Array, axis: int = 1) -> jax.Array:
  """Writes T entries from slot `cursor` on, round the end of the buffer.

  One entry is written as a slice, which XLA does in place in a decoding loop; a
  scatter there cost 7-12% of the time, `where` more than twice the time.

  Args:
    buffer: S slots along `axis`.
    new: T entries along `axis`, at most S; else of the buffer's shape.
    cursor: where the first goes, counted past the end of the buffer.
    axis: 1 or 2.
  """
  size, time = buffer.shape[axis], new.shape[axis]
  if time > size:
    raise ValueError(f'{time} tokens in one call do not fit a cache of {size} slots')
  new = new.astype(buffer.dtype)
  if time == 1:
    return jax.lax.dynamic_update_slice_in_dim(buffer, new, cursor % size, axis=axis)
  slots_T = (cursor + jnp.arange(time)) % size
  return buffer.at[(slice(None),) * axis + (slots_T,)].set(new, unique_indices=True)
