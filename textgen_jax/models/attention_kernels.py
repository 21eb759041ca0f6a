"""Softmax attention without a cache, other than all weights at once: accelerators' kernels, and blocks of queries.

Each equals `attention.Attention.mix` up to rounding.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from textgen_jax import axes, backend
from textgen_jax.models import base, layers

# What `model.attention_kernel` may be. auto: cudnn on an NVIDIA GPU, splash on a TPU and causal on a CPU, where they can; else plain.
KERNELS = ('auto', 'plain', 'causal', 'cudnn', 'splash', 'blocks')
OF_BACKEND = {'cpu': 'causal', 'gpu': 'cudnn', 'tpu': 'splash'}

LANES = 128  # a TPU's vector registers are so wide, and splash's blocks are multiples of it
LARGEST_SPLASH_BLOCK = 512
HOPPER, WIDEST_CUDNN_HEAD = 9.0, 256  # compute capability from which cuDNN takes heads so wide, as JAX has it; half as wide before
SPANS, SHORTEST_SPAN, LARGEST_BLOCK = 8, 256, 256  # of `blocks`; each span is a program of its own, in each layer


@struct.dataclass
class Sight:
  """The mask of a call without a cache, as a rule: no later token, none `window` or more back, none of another segment."""

  window: int = struct.field(pytree_node=False)
  segment_BT: Any = None  # integers, equal within a document; None: no row has several

  def mask(self, queries_T: jax.Array, keys: slice) -> jax.Array:
    """True where a query may look, [B, T, S]; B is 1 without segments."""
    back_TS = queries_T[:, None] - jnp.arange(keys.start, keys.stop)
    mask_BTS = ((back_TS >= 0) & (back_TS < self.window))[None]
    if self.segment_BT is None:
      return mask_BTS
    return mask_BTS & (self.segment_BT[:, queries_T, None] == self.segment_BT[:, None, keys])


def choose(kernel: str, q_BTHK: Any, k_BGSK: Any, sight: Sight | None, constrain: base.Constrain, *, dropout: float, changed: bool) -> str:
  """The kernel of one call: the one that is asked for or, where that can't do it, plain. Arrays may be abstract."""
  if kernel == 'auto':
    kernel = OF_BACKEND.get(backend.name(), 'plain')
  if sight is None or kernel == 'plain':
    return 'plain'
  return 'plain' if obstacle(kernel, q_BTHK, k_BGSK, sight, constrain, dropout=dropout, changed=changed) else kernel


def obstacle(kernel: str, q_BTHK: Any, k_BGSK: Any, sight: Sight, constrain: base.Constrain, *, dropout: float, changed: bool) -> str:
  """Why `kernel` can't do a call; empty where it can.

  Args:
    kernel: causal | cudnn | splash | blocks.
    q_BTHK: queries, perhaps abstract.
    k_BGSK: keys, alike.
    sight: what they may look at.
    constrain: the model's.
    dropout: of the weights, in this call.
    changed: that the attention's mathematics is a variant's own.
  """
  if changed:
    return 'the variant that model.attention names has mathematics of its own'
  if kernel == 'blocks':
    return ''
  if dropout:
    return f'it drops no attention weights, and model.attention_dropout is {dropout}'
  if kernel == 'causal':  # XLA's own operations: they lie as their arrays do
    return 'it masks neither documents nor a window' if sight.segment_BT is not None or sight.window < q_BTHK.shape[1] else ''
  reason = backend.nvidia_obstacle() if kernel == 'cudnn' else backend.tpu_obstacle()
  if reason:
    return reason
  ways = getattr(constrain, 'ways', (lambda name: 1) if backend.device_count() == 1 else None)
  if ways is None or q_BTHK.shape[0] % ways(axes.BATCH) or k_BGSK.shape[1] % ways(axes.HEADS):
    return 'on several devices it needs rows and groups of heads that are split evenly over a mesh'
  return _cudnn_obstacle(q_BTHK, k_BGSK, sight) if kernel == 'cudnn' else _splash_obstacle(q_BTHK)


def _cudnn_obstacle(q_BTHK: Any, k_BGSK: Any, sight: Sight) -> str:
  if sight.segment_BT is not None:
    return 'it masks no documents'  # but by a bias of [B, 1, T, S], whose gradient it then makes too
  if not backend.is_here():
    return _cudnn_obstacle_by_rule(q_BTHK) or backend.ABSENT_GPU
  try:  # JAX knows which widths and types cuDNN takes, by version and GPU
    jax.eval_shape(functools.partial(cudnn, sight=sight), q_BTHK, k_BGSK, k_BGSK)
  except (NotImplementedError, RuntimeError, ValueError) as error:
    return str(error)
  return ''


def _cudnn_obstacle_by_rule(q_BTHK: Any) -> str:
  """What JAX would say where the GPU is: elsewhere it finds no cuDNN, and asks no further."""
  if q_BTHK.dtype not in (jnp.bfloat16, jnp.float16):
    return f'queries must be fp16/bf16, got {q_BTHK.dtype}'
  width, most = q_BTHK.shape[-1], WIDEST_CUDNN_HEAD if backend.compute_capability() >= HOPPER else WIDEST_CUDNN_HEAD // 2
  return f'the head dim must be <= {most} and a multiple of 8, but got {width}' if width > most or width % 8 else ''


def _splash_obstacle(q_BTHK: Any) -> str:
  if q_BTHK.shape[1] % LANES:
    return f"a row's {q_BTHK.shape[1]} tokens aren't a multiple of {LANES}"
  return ''


def apply(
  kernel: str, q_BTHK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, sight: Sight, constrain: base.Constrain
) -> jax.Array:
  """cudnn's or splash's attention, [B, T, H, K], each device on its own rows and heads."""
  function = {'cudnn': cudnn, 'splash': splash}[kernel]
  split: Callable[..., Any] | None = getattr(constrain, 'split', None)
  if split is not None:
    queries, keys = (axes.BATCH, None, axes.HEADS), (axes.BATCH, axes.HEADS)
    function = split(function, (queries, keys, keys, (axes.BATCH,)), queries)
  return function(q_BTHK, k_BGSK, v_BGSK, sight)


def cudnn(q_BTHK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, sight: Sight) -> jax.Array:
  """Flash attention of cuDNN. Source: Dao 2023, arXiv:2307.08691."""
  k_BSGK, v_BSGK = k_BGSK.swapaxes(1, 2), v_BGSK.swapaxes(1, 2)
  past = (sight.window - 1, 0) if sight.window < q_BTHK.shape[1] else None
  return jax.nn.dot_product_attention(q_BTHK, k_BSGK, v_BSGK, is_causal=True, local_window_size=past, implementation='cudnn')


def splash(q_BTHK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, sight: Sight, interpret: bool = False) -> jax.Array:
  """Flash attention of JAX's Pallas kernels for TPUs, which skips blocks that the mask hides.

  Args:
    q_BTHK: queries; T is a multiple of 128.
    k_BGSK: keys.
    v_BGSK: values.
    sight: what may be looked at.
    interpret: Pallas's own switch: slowly, and on any backend.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention  # 0.06 s that no other start need wait for

  time, heads, head_dim = q_BTHK.shape[1:]
  kernel = _splash_kernel(time, heads, min(sight.window, time), interpret)
  segments = None if sight.segment_BT is None else splash_attention.SegmentIds(sight.segment_BT, sight.segment_BT)
  q_BHTK = (q_BTHK * head_dim**-0.5).swapaxes(1, 2)
  return jax.vmap(kernel)(q_BHTK, k_BGSK, v_BGSK, segments).swapaxes(1, 2)


@functools.lru_cache(maxsize=8)
def _splash_kernel(time: int, heads: int, window: int, interpret: bool) -> Any:
  """The kernel of such rows, once for all layers: of 32,768 tokens and 8 heads, which blocks its mask hides took 6 s to find."""
  from jax.experimental.pallas.ops.tpu import splash_attention

  size = next(size for size in range(LARGEST_SPLASH_BLOCK, 0, -LANES) if time % size == 0)
  sizes = splash_attention.BlockSizes(size, size, size, size, size, size, size, size)  # of queries and keys, forward and backward
  if window < time:
    mask: Any = splash_attention.LocalMask((time, time), (window - 1, 0), offset=0)
  else:
    mask = splash_attention.CausalMask((time, time))
  with jax.ensure_compile_time_eval():  # else its tables belong to the trace that is going on
    kernel = splash_attention.make_splash_mha(
      splash_attention.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
  return jax.tree.map(np.asarray, kernel)


def blocks(
  q_BTHK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, sight: Sight, dropout: float = 0.0, key: jax.Array | None = None
) -> jax.Array:
  """Attention of a block of queries at a time, computed anew in the backward pass: memory grows with T, not with T * T.

  A row is cut into spans, whose queries meet the keys before the span's end alone, which saves almost half of the work, and
  spans into blocks, which take turns. Forward and backward, 8 heads 64 wide on two CPU cores, 4,096 tokens: 2.0 s and 0.3 GB
  beside 4.6 s and 2.2 GB of the plain way.

  Args:
    q_BTHK: queries.
    k_BGSK: keys.
    v_BGSK: values.
    sight: what may be looked at.
    dropout: of the weights.
    key: random; not used without dropout.

  Returns:
    What each query draws from the values that it may look at, [B, T, H, K].
  """
  time = q_BTHK.shape[1]
  span = -(-time // min(SPANS, -(-time // SHORTEST_SPAN)))
  drawn = []
  for low in range(0, time, span):
    keys = slice(max(0, low - sight.window + 1), min(low + span, time))
    span_key = None if key is None else jax.random.fold_in(key, low)
    drawn.append(_span(q_BTHK[:, low : keys.stop], k_BGSK[:, :, keys], v_BGSK[:, :, keys], sight, keys, low, dropout, span_key))
  return jnp.concatenate(drawn, axis=1)


def _span(
  q_BTHK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, sight: Sight, keys: slice, low: int, dropout: float, key: jax.Array | None
) -> jax.Array:
  """Queries from the row's place `low` on, over the keys of the places `keys`."""
  batch, time, heads, head_dim = q_BTHK.shape
  groups = k_BGSK.shape[1]
  number = -(-time // LARGEST_BLOCK)
  size = -(-time // number)

  @jax.checkpoint
  def block(q_BTGRK: jax.Array, place_T: jax.Array, index: jax.Array) -> jax.Array:
    s_BGRTS = jnp.einsum('BTGRK,BGSK->BGRTS', q_BTGRK, k_BGSK, preferred_element_type=jnp.float32)
    p_BGRTS = jax.nn.softmax(jnp.where(sight.mask(place_T, keys)[:, None, None], s_BGRTS, layers.MASKED), axis=-1)
    if dropout and key is not None:
      kept = jax.random.bernoulli(jax.random.fold_in(key, index), 1 - dropout, p_BGRTS.shape)
      p_BGRTS = jnp.where(kept, p_BGRTS / (1 - dropout), 0)
    return jnp.einsum('BGRTS,BGSK->BTGRK', p_BGRTS.astype(v_BGSK.dtype), v_BGSK)

  pad = number * size - time
  q_BTHK = jnp.pad(q_BTHK * head_dim**-0.5, ((0, 0), (0, pad), (0, 0), (0, 0)))
  q_NBTGRK = q_BTHK.reshape(batch, number, size, groups, heads // groups, head_dim).swapaxes(0, 1)
  # Padded queries stand at the last place again.
  place_NT = jnp.minimum(low + jnp.arange(number * size), low + time - 1).reshape(number, size)
  _, y_NBTGRK = jax.lax.scan(lambda _, x: (None, block(*x)), None, (q_NBTGRK, place_NT, jnp.arange(number)))
  return y_NBTGRK.swapaxes(0, 1).reshape(batch, number * size, heads, -1)[:, :time]
