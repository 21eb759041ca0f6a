"""A causal Transformer, from the GPT-2 style to the modern one."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from textgen_jax import axes
from textgen_jax.models import attention, attention_kernels, base, depth, layers, rope


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class TransformerConfig:
  """Sizes and style. The trained context is `training.sequence_length`."""

  dim: int = 256  # D, the residual stream's width
  num_layers: int = 6
  num_heads: int = 4  # H; divides dim
  num_kv_heads: int = 0  # G; divides num_heads; 0: as many as num_heads
  hidden_dim: int = 0  # F; 0: 4 * dim
  position: str = 'rotary'  # rotary | learned
  rope_theta: float = 10_000.0
  norm: str = 'rms'  # rms | layer
  activation: str = 'relu2'  # relu2 | swiglu | gelu
  attention: str = 'softmax'  # a name in models/build.py's table
  attention_kernel: str = 'auto'  # auto (the backend's own where it can) | plain | causal (CPU) | cudnn (GPU) | splash (TPU) | blocks
  qk_norm: bool = True  # RMS norm of queries and keys
  bias: bool = False  # in dense layers and layer norms
  tied_embedding: bool = False  # one table for input and output
  logit_softcap: float = 0.0  # logits are squeezed between it and its negative; 0: they aren't
  init: str = 'zero_residual'  # zero_residual | gpt2
  dropout: float = 0.0  # of embeddings and both branches' outputs
  attention_dropout: float = 0.0  # of attention weights, which no kernel but `blocks` drops
  remat: str = 'none'  # none | full (each block is computed again in the backward pass: less memory, a third more work) | dots (see REMAT)
  scan_layers: bool = False  # all layers as a loop: deep models compile sooner for GPUs, later for CPUs; takes a copy of them
  vocab_multiple: int = 1  # the vocabulary is padded to a multiple of it
  compute_dtype: str = 'auto'  # auto (bfloat16 on GPU and TPU, float32 on CPU) | float32 | bfloat16


@struct.dataclass
class TransformerCache:
  """Keys and values by slot; what a query may look at follows from `index_BS` alone."""

  layers: tuple[tuple[jax.Array, jax.Array], ...]  # each layer's keys and values, [B, G, S, K]
  index_BS: jax.Array  # how many valid tokens of its row came before the slot's; -1: nothing there
  count_B: jax.Array  # valid tokens so far
  document_B: jax.Array  # index of the current document's first token
  cursor_B: jax.Array  # next slot, the same in all rows


class MLP(nn.Module):
  """The feed-forward branch.

  Sources: GELU, Hendrycks & Gimpel 2016, arXiv:1606.08415 (tanh form, as in GPT-2);
  squared ReLU, So et al. 2021, arXiv:2109.08668; SwiGLU, Shazeer 2020, arXiv:2002.05202.
  """

  config: TransformerConfig
  dtype: str
  kernel_init: layers.Initializer
  output_init: layers.Initializer
  constrain: base.Constrain = base.unconstrained

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    c = self.config
    hidden_dim = c.hidden_dim or 4 * c.dim
    up = functools.partial(layers.Dense, hidden_dim, (axes.EMBED, axes.MLP), self.kernel_init, c.bias, self.dtype)
    x_BTF = up(name='up')(x_BTD)
    if c.activation == 'gelu':
      x_BTF = nn.gelu(x_BTF, approximate=True)
    elif c.activation == 'relu2':
      x_BTF = jnp.square(nn.relu(x_BTF))
    else:
      x_BTF = nn.silu(up(name='gate')(x_BTD)) * x_BTF
    x_BTF = self.constrain(x_BTF, (axes.BATCH, axes.TIME, axes.MLP))
    return layers.Dense(c.dim, (axes.MLP, axes.EMBED), self.output_init, c.bias, self.dtype, name='down')(x_BTF)


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  config: TransformerConfig
  attention_class: type[nn.Module]
  dtype: str
  constrain: base.Constrain

  @nn.compact
  def __call__(self, x_BTD: jax.Array, frame: attention.Frame, cache: Any, deterministic: bool) -> tuple[jax.Array, Any]:
    c = self.config
    kernel_init, output_init = inits(c)
    drop = functools.partial(nn.Dropout(c.dropout, name='dropout'), deterministic=deterministic)
    attend = self.attention_class(c, self.dtype, kernel_init, output_init, self.constrain, name='attention')
    y_BTD, cache = attend(norm('attention_norm', c, self.dtype)(x_BTD), frame, cache, deterministic)
    x_BTD = self.constrain(x_BTD + drop(y_BTD), layers.RESIDUAL)
    y_BTD = MLP(c, self.dtype, kernel_init, output_init, self.constrain, name='mlp')(norm('mlp_norm', c, self.dtype)(x_BTD))
    return self.constrain(x_BTD + drop(y_BTD), layers.RESIDUAL), cache


class Transformer(nn.Module):
  """See `models.base` for the contract."""

  config: TransformerConfig
  vocab_size: int
  context_length: int
  attention_class: type[nn.Module] = attention.Attention
  constrain: base.Constrain = base.unconstrained

  @property
  def slides(self) -> bool:
    return self.config.position == 'learned'

  @property
  def window(self) -> int:
    return self.context_length

  def setup(self) -> None:
    c, dtype = self.config, layers.resolve_dtype(self.config.compute_dtype)
    size = layers.padded_size(self.vocab_size, c.vocab_multiple)
    kernel_init, _ = inits(c)
    self.embed = layers.Embed(size, c.dim, axes.VOCAB, nn.initializers.normal(0.02), dtype, self.constrain)
    if c.position == 'learned':
      self.position = layers.Embed(self.context_length, c.dim, axes.POSITION, nn.initializers.normal(0.02), dtype, self.constrain)
    self.embed_dropout = nn.Dropout(c.dropout)
    block = depth.block_class(Block, c.remat)
    self.block = [block(c, self.attention_class, dtype, self.constrain) for _ in range(c.num_layers)]
    self.final_norm = norm(None, c, dtype)
    if not c.tied_embedding:
      self.unembedding = layers.Dense(size, (axes.EMBED, axes.VOCAB), kernel_init, False, dtype)

  def __call__(
    self,
    tokens_BT: jax.Array,
    cache: TransformerCache | None = None,
    valid_BT: jax.Array | None = None,
    starts_BT: jax.Array | None = None,
    deterministic: bool = True,
  ) -> tuple[jax.Array, TransformerCache | None]:
    if self.slides and tokens_BT.shape[1] > self.context_length:
      raise ValueError(f'{tokens_BT.shape[1]} tokens in one call, but learned positions end at {self.context_length}')
    frame, cache = locate(tokens_BT, cache, valid_BT, starts_BT, self.context_length)
    if self.config.position == 'rotary':
      head_dim = self.config.dim // self.config.num_heads
      frame = frame._replace(rotation=rope.rotation(frame.position_BT, head_dim, self.config.rope_theta))
    x_BTD = self.embed(tokens_BT)
    if self.slides:
      x_BTD = x_BTD + self.position(jnp.asarray(frame.position_BT))
    x_BTD = self.constrain(self.embed_dropout(x_BTD, deterministic=deterministic), layers.RESIDUAL)
    if cache is None and self.config.scan_layers and not self.is_initializing():
      return self.final_norm(self._scan(x_BTD, frame, deterministic)), None
    written = []
    for i, block in enumerate(self.block):
      x_BTD, layer = block(x_BTD, frame, None if cache is None else cache.layers[i], deterministic)
      written.append(layer)
    hidden_BTD = self.final_norm(x_BTD)
    return hidden_BTD, None if cache is None else dataclasses.replace(cache, layers=tuple(written))

  def _scan(self, x_BTD: jax.Array, frame: attention.Frame, deterministic: bool) -> jax.Array:
    c, dtype = self.config, layers.resolve_dtype(self.config.compute_dtype)

    def make_block(scope: Any) -> nn.Module:
      return Block(c, self.attention_class, dtype, self.constrain, parent=scope)

    return depth.scan(self, self.block, make_block, c.remat, self.constrain, x_BTD, frame, None, deterministic)

  def unembed(self, hidden_BTD: jax.Array) -> jax.Array:
    logits_BTV = self.embed.attend(hidden_BTD) if self.config.tied_embedding else self.unembedding(hidden_BTD)
    if self.config.logit_softcap:
      logits_BTV = layers.soft_cap(logits_BTV, self.config.logit_softcap)
    return layers.hide_padding(logits_BTV, self.vocab_size)

  def init_everything(self, tokens_BT: jax.Array) -> jax.Array:
    """Touches every parameter; for `init`."""
    return self.unembed(self(tokens_BT)[0])

  def init_cache(self, batch: int, length: int, rewinds: int = 0) -> TransformerCache:
    """Room for `length` tokens a row; past `window` + chunk - 1 of them it works as a ring. Any of them can be taken back."""
    del rewinds
    c = self.config
    shape = (batch, c.num_kv_heads or c.num_heads, length, c.dim // c.num_heads)
    dtype = layers.resolve_dtype(c.compute_dtype)

    def zeros() -> jax.Array:  # a row of its own each time: the cursor's one buffer can't be donated twice
      return jnp.zeros((batch,), jnp.int32)

    return TransformerCache(
      layers=tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(c.num_layers)),
      index_BS=jnp.full((batch, length), -1, jnp.int32),
      count_B=zeros(),
      document_B=zeros(),
      cursor_B=zeros(),
    )

  def grow_cache(self, cache: TransformerCache, length: int) -> TransformerCache:
    """More slots, same content. Only before the ring has come round: slots keep their numbers."""
    more = length - cache.index_BS.shape[1]
    pad = functools.partial(jnp.pad, pad_width=((0, 0), (0, 0), (0, more), (0, 0)))
    index_BS = jnp.pad(cache.index_BS, ((0, 0), (0, more)), constant_values=-1)
    return dataclasses.replace(cache, layers=jax.tree.map(pad, cache.layers), index_BS=index_BS)

  def rewind(self, cache: TransformerCache, steps_B: jax.Array) -> TransformerCache:
    """Empties each row's last `steps_B` slots. Those that all rows take back are written again; others stay as holes.

    A ring keeps its window where a call of at most its chunk is taken back before the next.
    """
    size = cache.index_BS.shape[1]
    back_BS = (cache.cursor_B[:, None] - 1 - jnp.arange(size)) % size  # how many slots behind the last one
    drop_BS = back_BS < steps_B[:, None]
    return dataclasses.replace(
      cache,
      index_BS=jnp.where(drop_BS, -1, cache.index_BS),
      count_B=cache.count_B - (drop_BS & (cache.index_BS >= 0)).sum(axis=1, dtype=jnp.int32),
      cursor_B=cache.cursor_B - steps_B.min(),
    )

  def mixing_flops_per_token(self, length: int) -> int:
    """Scores and weighted sums of one token over `length` keys, forward."""
    return 4 * self.config.num_layers * self.config.dim * length


def locate(
  tokens_BT: jax.Array,
  cache: TransformerCache | None,
  valid_BT: jax.Array | None,
  starts_BT: jax.Array | None,
  window: int,
) -> tuple[attention.Frame, TransformerCache | None]:
  """Gives each token its position and mask, and enters it into the cache's index."""
  batch, time = tokens_BT.shape
  if cache is None and valid_BT is None and starts_BT is None:
    t = jnp.arange(time)
    mask_TS = (t[None, :] <= t[:, None]) & (t[None, :] > t[:, None] - window)
    position_T = np.arange(time) if time <= rope.CONSTANT_TOKENS else t  # of 2**31 tokens NumPy's took 16 GB of the host
    return attention.Frame(position_T[None], mask_TS[None], None, sight=attention_kernels.Sight(window)), None
  holes = valid_BT is not None
  valid_BT = jnp.ones((batch, time), bool) if valid_BT is None else valid_BT
  count_B = jnp.zeros((batch,), jnp.int32) if cache is None else cache.count_B
  document_B = jnp.zeros((batch,), jnp.int32) if cache is None else cache.document_B
  index_BT = count_B[:, None] + jnp.cumsum(valid_BT, axis=1, dtype=jnp.int32) - 1
  document_BT = jnp.broadcast_to(document_B[:, None], (batch, time))
  if starts_BT is not None:
    begun_BT = jax.lax.cummax(jnp.where(starts_BT & valid_BT, index_BT, -1), axis=1)
    document_BT = jnp.maximum(document_BT, begun_BT)
  entry_BT = jnp.where(valid_BT, index_BT, -1)
  cursor, index_BS, sight = None, entry_BT, None
  if cache is None and (time <= window or not holes):  # a window over holes is no distance between places
    sight = attention_kernels.Sight(window, jnp.where(valid_BT, document_BT, -1))
  if cache is not None:
    cursor = cache.cursor_B[0]
    index_BS = attention.write_slots(cache.index_BS, entry_BT, cursor)
    cache = dataclasses.replace(
      cache,
      index_BS=index_BS,
      count_B=index_BT[:, -1] + 1,
      document_B=document_BT[:, -1],
      cursor_B=cache.cursor_B + time,
    )
  first_BT = jnp.maximum(jnp.maximum(document_BT, index_BT - window + 1), 0)  # the oldest token in sight
  mask_BTS = (index_BS[:, None, :] <= index_BT[:, :, None]) & (index_BS[:, None, :] >= first_BT[:, :, None])
  return attention.Frame(jnp.maximum(index_BT - document_BT, 0), mask_BTS, cursor, sight=sight), cache


def norm(name: str | None, config: TransformerConfig, dtype: str) -> nn.Module:
  if config.norm == 'layer':
    return layers.layer_norm(name, use_bias=config.bias, dtype=dtype)
  return layers.rms_norm(name, axis=axes.EMBED, dtype=dtype)


def inits(config: TransformerConfig) -> tuple[layers.Initializer, layers.Initializer]:
  """Initializers of kernels, and of the two that write to the residual stream.

  gpt2: 0.02, and 0.02 / sqrt(2 layers) (Radford et al. 2019, section 2.3).
  zero_residual: fan-in scaling, and zero, so that every block begins as the
  identity (Zhang et al. 2019, arXiv:1901.09321).
  """
  if config.init == 'gpt2':
    return nn.initializers.normal(0.02), nn.initializers.normal(0.02 / (2 * config.num_layers) ** 0.5)
  return nn.initializers.lecun_normal(), nn.initializers.zeros
