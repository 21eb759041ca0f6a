"""A stacked LSTM whose cache is its carry."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from textgen_jax import axes
from textgen_jax.models import base, layers


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class LSTMConfig:
  """Sizes and regularisation. `training.sequence_length` is the span of backpropagation through time."""

  dim: int = 512  # D; of the embedding, the hidden state and the cell
  num_layers: int = 2
  forget_bias: float = 1.0  # added before the sigmoid; Jozefowicz et al. 2015
  dropout: float = 0.0  # of every layer's output; Zaremba et al. 2014, arXiv:1409.2329
  input_dropout: float = 0.0  # of the embedded tokens
  recurrent_dropout: float = 0.0  # of the hidden state, one mask a sequence; Gal & Ghahramani 2016, arXiv:1512.05287
  tied_embedding: bool = True  # one table for input and output; Press & Wolf 2017, arXiv:1608.05859
  vocab_multiple: int = 1  # the vocabulary is padded to a multiple of it
  compute_dtype: str = 'auto'  # auto (bfloat16 on GPU and TPU, float32 on CPU) | float32 | bfloat16


@struct.dataclass
class LSTMCache:
  """The carry of N layers, in float32, and those of the R places before, the oldest first, for `rewind`."""

  hidden_BND: jax.Array
  cell_BND: jax.Array
  past_hidden_BRND: jax.Array | None = None
  past_cell_BRND: jax.Array | None = None


class LSTMLayer(nn.Module):
  """One layer over time-major input, gates in the order input, forget, cell, output.

  Source: Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000.
  Inits: Glorot & Bengio 2010 for the input, orthogonal for the recurrence (Saxe et al. 2013).
  """

  config: LSTMConfig
  dtype: str

  @nn.compact
  def __call__(
    self, x_TBD: jax.Array, carry: tuple[jax.Array, jax.Array], valid_TB: Any, starts_TB: Any, deterministic: bool, keeps: bool = False
  ) -> tuple[jax.Array, Any, Any]:
    """Outputs, the last carry, and the carries after each time where it `keeps` them."""
    c = self.config
    names = (axes.EMBED, axes.GATES)
    # The input's products for all times at once; only the recurrence is left to the loop.
    gates = layers.Dense(4 * c.dim, names, nn.initializers.glorot_uniform(), True, self.dtype, name='input')(x_TBD)
    kernel = self.param('recurrent_kernel', layers.partitioned(nn.initializers.orthogonal(), *names), (c.dim, 4 * c.dim))
    kernel = kernel.astype(self.dtype)
    keep_BD = None
    if c.recurrent_dropout and not deterministic:
      keep_BD = jax.random.bernoulli(self.make_rng('dropout'), 1 - c.recurrent_dropout, carry[0].shape) / (1 - c.recurrent_dropout)

    def step(carry: tuple[jax.Array, jax.Array], inputs: Any) -> tuple[tuple[jax.Array, jax.Array], Any]:
      x_gates, valid_B, starts_B = inputs
      hidden_BD, cell_BD = carry
      if starts_B is not None:
        hidden_BD, cell_BD = (jnp.where(starts_B[:, None], 0, s) for s in (hidden_BD, cell_BD))
      seen_BD = hidden_BD if keep_BD is None else hidden_BD * keep_BD
      all_gates = (x_gates + seen_BD.astype(self.dtype) @ kernel).astype(jnp.float32)
      i, f, g, o = jnp.split(all_gates, 4, axis=-1)
      new_cell_BD = nn.sigmoid(f + c.forget_bias) * cell_BD + nn.sigmoid(i) * jnp.tanh(g)
      new_hidden_BD = nn.sigmoid(o) * jnp.tanh(new_cell_BD)
      if valid_B is not None:  # an invalid token's start goes with it
        new_cell_BD = jnp.where(valid_B[:, None], new_cell_BD, carry[1])
        new_hidden_BD = jnp.where(valid_B[:, None], new_hidden_BD, carry[0])
      carry = new_hidden_BD, new_cell_BD
      return carry, (new_hidden_BD.astype(self.dtype), carry if keeps else None)

    carry, (y_TBD, carries_T) = jax.lax.scan(step, carry, (gates, valid_TB, starts_TB))
    return y_TBD, carry, carries_T


class LSTM(nn.Module):
  """See `models.base` for the contract."""

  config: LSTMConfig
  vocab_size: int
  context_length: int
  constrain: base.Constrain = base.unconstrained

  slides = False
  window = None

  def setup(self) -> None:
    c, dtype = self.config, layers.resolve_dtype(self.config.compute_dtype)
    size = layers.padded_size(self.vocab_size, c.vocab_multiple)
    # Merity et al. 2017, arXiv:1708.02182: uniform in (-0.1, 0.1).
    self.embed = layers.Embed(size, c.dim, axes.VOCAB, symmetric_uniform(0.1), dtype)
    self.input_dropout = nn.Dropout(c.input_dropout)
    self.layer = [LSTMLayer(c, dtype) for _ in range(c.num_layers)]
    self.output_dropout = nn.Dropout(c.dropout)
    if not c.tied_embedding:
      self.unembedding = layers.Dense(size, (axes.EMBED, axes.VOCAB), nn.initializers.lecun_normal(), False, dtype)

  def __call__(
    self,
    tokens_BT: jax.Array,
    cache: LSTMCache | None = None,
    valid_BT: jax.Array | None = None,
    starts_BT: jax.Array | None = None,
    deterministic: bool = True,
  ) -> tuple[jax.Array, LSTMCache | None]:
    state = self.init_cache(tokens_BT.shape[0], 0) if cache is None else cache
    valid_TB, starts_TB = (None if x is None else x.T for x in (valid_BT, starts_BT))
    # Time first, once for all layers: the loop reads its inputs a step at a time.
    x_TBD = self.constrain(self.embed(tokens_BT.T), (axes.TIME, axes.BATCH, None))
    x_TBD = self.input_dropout(x_TBD, deterministic=deterministic)
    carries, passed = [], []
    keeps = state.past_hidden_BRND is not None
    for n, layer in enumerate(self.layer):
      x_TBD, carry, carries_T = layer(x_TBD, (state.hidden_BND[:, n], state.cell_BND[:, n]), valid_TB, starts_TB, deterministic, keeps)
      x_TBD = self.output_dropout(x_TBD, deterministic=deterministic)
      carries.append(carry)
      passed.append(carries_T)
    hidden_BTD = self.constrain(x_TBD.swapaxes(0, 1), layers.RESIDUAL)
    if cache is None:
      return hidden_BTD, None
    last = LSTMCache(*(jnp.stack(states, axis=1) for states in zip(*carries, strict=True)))
    if not keeps:
      return hidden_BTD, last
    new_hidden_BTND, new_cell_BTND = (jnp.stack(states, axis=2).swapaxes(0, 1) for states in zip(*passed, strict=True))
    hidden_BRND, cell_BRND = _line_up(cache)
    size = hidden_BRND.shape[1]
    hidden_BRND, cell_BRND = (
      jnp.concatenate(both, axis=1)[:, -size:-1] for both in ((hidden_BRND, new_hidden_BTND), (cell_BRND, new_cell_BTND))
    )
    return hidden_BTD, dataclasses.replace(last, past_hidden_BRND=hidden_BRND, past_cell_BRND=cell_BRND)

  def unembed(self, hidden_BTD: jax.Array) -> jax.Array:
    logits_BTV = self.embed.attend(hidden_BTD) if self.config.tied_embedding else self.unembedding(hidden_BTD)
    return layers.hide_padding(logits_BTV, self.vocab_size)

  def init_everything(self, tokens_BT: jax.Array) -> jax.Array:
    """Touches every parameter; for `init`."""
    return self.unembed(self(tokens_BT)[0])

  def init_cache(self, batch: int, length: int, rewinds: int = 0) -> LSTMCache:
    """A zero carry; it takes any number of tokens, so `length` changes nothing. Carries are kept for `rewinds` places."""
    del length
    layers_and_width = self.config.num_layers, self.config.dim

    def zeros(*lead: int) -> jax.Array:  # a buffer each: one can't be donated twice
      return jnp.zeros((batch, *lead, *layers_and_width), jnp.float32)

    return LSTMCache(zeros(), zeros(), *((zeros(rewinds), zeros(rewinds)) if rewinds else ()))

  def grow_cache(self, cache: LSTMCache, length: int) -> LSTMCache:
    del length
    return cache

  def rewind(self, cache: LSTMCache, steps_B: jax.Array) -> LSTMCache:
    """Picks among the kept carries; those from before the oldest one are lost."""
    states = _line_up(cache)
    place_BR = jnp.maximum(jnp.arange(states[0].shape[1]) - steps_B[:, None], 0)
    hidden_BRND, cell_BRND = (jnp.take_along_axis(state_BRND, place_BR[:, :, None, None], axis=1) for state_BRND in states)
    return LSTMCache(hidden_BRND[:, -1], cell_BRND[:, -1], hidden_BRND[:, :-1], cell_BRND[:, :-1])

  def mixing_flops_per_token(self, length: int) -> int:
    """Tokens meet only in the recurrence, whose products are counted with the kernels."""
    del length
    return 0


def _line_up(cache: LSTMCache) -> tuple[jax.Array, jax.Array]:
  """Hidden states and cells that were kept, the oldest first, the present ones last, [B, R + 1, N, D]."""
  if cache.past_hidden_BRND is None or cache.past_cell_BRND is None:
    raise ValueError('this cache keeps no carries: init_cache(batch, length, rewinds=...) does')
  hidden_BRND = jnp.concatenate([cache.past_hidden_BRND, cache.hidden_BND[:, None]], axis=1)
  return hidden_BRND, jnp.concatenate([cache.past_cell_BRND, cache.cell_BND[:, None]], axis=1)


def symmetric_uniform(limit: float) -> layers.Initializer:
  def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -limit, limit)

  return init
