"""A stacked LSTM whose cache is its carry."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from textgen_jax import axes
from textgen_jax.models import base, layers, products, recurrence, recurrence_kernels


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class LSTMConfig:
  """Sizes and regularisation. `training.sequence_length` is the span of backpropagation through time."""

  dim: int = 512  # D; of the embedding, the hidden state and the cell
  num_layers: int = 2
  forget_bias: float = 1.0  # added before the sigmoid; Jozefowicz et al. 2015
  dropout: float = 0.0  # of every layer's output; Zaremba et al. 2014, arXiv:1409.2329
  input_dropout: float = 0.0  # of the embedded tokens
  dropout_mask: str = 'token'  # token | sequence: how long those two keep a mask; Gal & Ghahramani 2016, arXiv:1512.05287
  embedding_dropout: float = 0.0  # of whole words, as inputs, one mask a batch; Merity et al. 2017, arXiv:1708.02182
  recurrent_dropout: float = 0.0  # of the hidden state, one mask a sequence; Gal & Ghahramani 2016, arXiv:1512.05287
  weight_dropout: float = 0.0  # of the recurrent kernels, one mask a batch; DropConnect of Merity et al. 2017, arXiv:1708.02182
  activation_penalty: float = 0.0  # times the mean square of the last layer's dropped output; Merity et al. 2017, arXiv:1708.01009
  temporal_penalty: float = 0.0  # times the mean square of its output's change from token to token; the same source
  tied_embedding: bool = True  # one table for input and output; Press & Wolf 2017, arXiv:1608.05859
  vocab_multiple: int = 1  # the vocabulary is padded to a multiple of it
  recurrence_kernel: str = 'auto'  # auto (triton on an NVIDIA GPU where it can) | plain | triton
  compute_dtype: str = 'auto'  # auto (bfloat16 on GPU and TPU, float32 on CPU) | float32 | bfloat16


@struct.dataclass
class LSTMCache:
  """The carry of N layers, in float32, and those of the R places before, the oldest first, for `rewind`."""

  hidden_BND: jax.Array
  cell_BND: jax.Array
  past_hidden_BRND: jax.Array | None = None
  past_cell_BRND: jax.Array | None = None


class Gates(nn.Module):
  """The input's part of the gates, [T, B, 4 D] or a table's [V, 4 D]; and their bias.

  The loop adds the bias: added to all times at once, it is one more pass.
  """

  dim: int
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    init = layers.partitioned(nn.initializers.glorot_uniform(), axes.EMBED, axes.GATES)
    kernel = self.param('kernel', init, (self.dim, 4 * self.dim))
    bias_G = self.param('bias', layers.partitioned(nn.initializers.zeros, axes.GATES), (4 * self.dim,))
    multiply = products.dense if x.ndim == 2 else products.dense_time_major
    return multiply(x.astype(self.dtype), kernel.astype(self.dtype)), bias_G


class LSTMLayer(nn.Module):
  """One layer over time-major input, gates in the order input, forget, cell, output.

  Inits: Glorot & Bengio 2010 for the input, orthogonal for the recurrence (Saxe et al. 2013).
  """

  config: LSTMConfig
  dtype: str
  constrain: base.Constrain = base.unconstrained

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    carry: recurrence.Carry,
    valid_TB: Any,
    starts_TB: Any,
    deterministic: bool,
    keeps: bool = False,
    ids_TB: Any = None,
  ) -> tuple[jax.Array, Any, Any]:
    """Outputs, the last carry, and the carries after each time where it `keeps` them.

    x is x_TBD; or, with `ids_TB`, a table x_VD whose rows they are.
    """
    c = self.config
    # The products for all times at once; only the recurrence is left to the loop.
    gates, bias_G = Gates(c.dim, self.dtype, name='input')(x)
    gates_TBG = gates if ids_TB is None else look_up(gates, ids_TB)
    bias_G = bias_G + c.forget_bias * (jnp.arange(4 * c.dim) // c.dim == 1)
    init = layers.partitioned(nn.initializers.orthogonal(), axes.EMBED, axes.GATES)
    kernel_DG = self.param('recurrent_kernel', init, (c.dim, 4 * c.dim))
    keep_BD = None
    if not deterministic:
      kernel_DG = kernel_DG if not c.weight_dropout else kernel_DG * self.mask(c.weight_dropout, kernel_DG.shape)
      keep_BD = None if not c.recurrent_dropout else self.mask(c.recurrent_dropout, carry[0].shape)
    loop = gates_TBG, bias_G, kernel_DG.astype(self.dtype), carry, keep_BD, valid_TB, starts_TB
    if not keeps:
      how = (gates_TBG.shape, valid_TB, self.constrain)
      if recurrence_kernels.choose(c.recurrence_kernel, *how) == 'triton':
        return *recurrence_kernels.apply(*loop[:5], starts_TB, self.constrain), None
      return *recurrence.recur(*loop), None
    last, carries_T = recurrence.scan(*loop)
    return carries_T[0].astype(self.dtype), last, carries_T

  def mask(self, rate: float, shape: tuple[int, ...]) -> jax.Array:
    return dropout_mask(self.make_rng('dropout'), rate, shape)


def dropout_mask(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
  """0 with probability `rate`, else what keeps the mean at 1."""
  return jax.random.bernoulli(key, 1 - rate, shape) / (1 - rate)


@jax.custom_vjp
def look_up(table_VG: jax.Array, ids_TB: jax.Array) -> jax.Array:
  """Rows of a table of few; the gradient is a product with one-hot rows, where that of `jnp.take` adds row by row."""
  return jnp.take(table_VG, ids_TB, axis=0)


def _look_up_backward(residuals: tuple[jax.Array, jax.Array], slope_TBG: jax.Array) -> tuple[jax.Array, None]:
  ids_TB, table_VG = residuals
  hot_TBV = jax.nn.one_hot(ids_TB, len(table_VG), dtype=slope_TBG.dtype)
  with products.operands('float32'):  # a look-up rounds nothing
    return products.kernel_gradient(hot_TBV, slope_TBG), None


look_up.defvjp(lambda table_VG, ids_TB: (look_up(table_VG, ids_TB), (ids_TB, table_VG)), _look_up_backward)


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
    self.embed = layers.Embed(size, c.dim, axes.VOCAB, symmetric_uniform(0.1), dtype, self.constrain)
    time_first = (0,) if c.dropout_mask == 'sequence' else ()
    self.input_dropout = nn.Dropout(c.input_dropout, broadcast_dims=time_first)
    self.layer = [LSTMLayer(c, dtype, self.constrain) for _ in range(c.num_layers)]
    self.output_dropout = nn.Dropout(c.dropout, broadcast_dims=time_first)
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
    x, ids_TB = self._inputs(tokens_BT.T, deterministic)
    carries, passed = [], []
    keeps = state.past_hidden_BRND is not None
    for n, layer in enumerate(self.layer):
      y_TBD, carry, carries_T = layer(
        x, (state.hidden_BND[:, n], state.cell_BND[:, n]), valid_TB, starts_TB, deterministic, keeps, ids_TB if n == 0 else None
      )
      x = x_TBD = self.output_dropout(y_TBD, deterministic=deterministic)
      carries.append(carry)
      passed.append(carries_T)
    if not deterministic:
      self._sow_penalties(x_TBD, y_TBD)
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

  def _inputs(self, tokens_TB: jax.Array, deterministic: bool) -> tuple[jax.Array, jax.Array | None]:
    """The embedded tokens, x_TBD; or the table, x_VD, and the ids, where it has fewer rows to multiply than there are tokens."""
    c = self.config
    keep_V = None
    if c.embedding_dropout and not deterministic:
      keep_V = dropout_mask(self.make_rng('dropout'), c.embedding_dropout, (self.embed.size,))
    if self.embed.size < min(tokens_TB.size, c.dim + 1) and (deterministic or not c.input_dropout):
      table_VD = self.embed.embedding
      return table_VD if keep_V is None else table_VD * keep_V[:, None], tokens_TB
    x_TBD = self.constrain(self.embed(tokens_TB), (axes.TIME, axes.BATCH, None))
    if keep_V is not None:
      x_TBD = x_TBD * keep_V[tokens_TB][..., None].astype(x_TBD.dtype)
    return self.input_dropout(x_TBD, deterministic=deterministic), None

  def _sow_penalties(self, dropped_TBD: jax.Array, y_TBD: jax.Array) -> None:
    """Losses a token, [B, T]; what `training.step` adds to the objective."""
    c, time = self.config, len(y_TBD)
    if c.activation_penalty:
      square_TB = jnp.square(dropped_TBD.astype(jnp.float32)).mean(-1)
      self.sow('losses', 'activation_penalty', c.activation_penalty * square_TB.T)
    if c.temporal_penalty and time > 1:
      change_TB = jnp.square(jnp.diff(y_TBD.astype(jnp.float32), axis=0)).mean(-1)
      # The first token has none before it; the factor makes the mean over all tokens that of the others.
      change_TB = jnp.pad(change_TB, ((1, 0), (0, 0))) * (time / (time - 1))
      self.sow('losses', 'temporal_penalty', c.temporal_penalty * change_TB.T)

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
