"""Bytes that one device holds in a training step: of the state exactly, of what the step makes by an estimate."""

import collections
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from textgen_jax import axes, backend, program, trees
from textgen_jax.models import build
from textgen_jax.training import losses

BLOCK = 256  # queries at once in the kernel `blocks`
FLOAT = 4  # bytes of float32


@dataclasses.dataclass(frozen=True)
class Tokens:
  """A micro-batch as one device sees it."""

  rows: int
  length: int

  @property
  def count(self) -> int:
    return self.rows * self.length


@dataclasses.dataclass(frozen=True)
class Layer:
  """What one layer takes for one token, in bytes."""

  kept: float  # from the forward pass to the backward pass
  working: float  # more, while its gradients are made


@dataclasses.dataclass(frozen=True)
class Footprint:
  """Bytes of one device."""

  params: int  # exact, and with an average of them; so are `optimizer` and `carry`
  optimizer: int
  carry: int
  gradients: int  # summed, and with micro-batches those of one beside
  weights: int  # in the type that products are computed in, those of an fsdp mesh made whole
  activations: int
  working: int
  logits: int  # of the tokens whose logits are there at once, with their gradient; and the output layer's own copies, where in chunks
  update: int = 0  # Muon's matrices of one shape, whole on each device, and what is made of them: when activations are gone

  @property
  def state(self) -> int:
    return self.params + self.optimizer + self.carry

  @property
  def peak(self) -> int:
    """All activations meet the logits at the end of the forward pass, and all gradients meet one layer's at that of the backward pass."""
    step = self.weights + self.activations + max(self.working, self.logits)
    return self.state + self.gradients + max(step, self.update)


def device_bytes(abstract: Any, shardings: Any) -> int:
  """Of a tree's arrays, what one device holds."""
  leaves = zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True)
  return sum(math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, sharding in leaves)


def is_table(name: str) -> bool:
  """Whether a parameter has a row or column an id, or a place."""
  return name.endswith('embedding') or name == 'unembedding/kernel'


def of_step(parts: program.Program) -> Footprint:
  """To be called as the program is traced: in `backend.target` of its devices' kind."""
  e, c = parts.experiment, parts.experiment.training
  state, places = parts.abstract, parts.shardings
  one_copy = device_bytes(state.params, places.params)
  tokens = Tokens(c.batch_size // c.accumulation_steps // parts.row_ways, c.sequence_length)
  layer = layer_of(parts)
  return Footprint(
    params=one_copy * (1 if state.trained is None else 2),
    optimizer=device_bytes(state.opt_state, places.opt_state),
    carry=device_bytes(state.carry, places.carry),
    gradients=one_copy * (2 if c.accumulation_steps > 1 else 1),
    weights=weights_bytes(parts),
    activations=int(e.model.num_layers * layer.kept * tokens.count),
    working=int(layer.working * tokens.count),
    logits=logits_bytes(parts, tokens),
    update=2 * FLOAT * max((numbers for numbers, _ in muon_stacks(parts)), default=0),
  )


def muon_stacks(parts: program.Program) -> list[tuple[int, int]]:
  """Of each stack of matrices that Muon makes orthogonal together: its numbers, what makes it even included; those of split matrices."""
  if parts.experiment.optimizer.kind != 'muon':
    return []
  stacks: dict[tuple[int, ...], list[bool]] = {}
  for (name, leaf), place in zip(trees.named_leaves(parts.abstract.params), jax.tree.leaves(parts.shardings.params), strict=True):
    if leaf.ndim == 2 and not is_table(name):
      split = any(parts.mesh.shape[axis] > 1 for axis in axes_of(place))
      stacks.setdefault(tuple(sorted(leaf.shape)), []).append(split)
  size = parts.mesh.size
  return [(-(-len(each) // size) * size * math.prod(shape), sum(each) * math.prod(shape)) for shape, each in stacks.items()]


def compute_itemsize(config: build.ModelConfig) -> int:
  """Bytes of a number in products, as models resolve `model.compute_dtype`."""
  if config.compute_dtype == 'auto':
    return FLOAT if backend.name() == 'cpu' else 2
  return jnp.dtype(config.compute_dtype).itemsize


def ways(parts: program.Program, axis: str) -> int:
  """How many ways activations are split along a logical axis."""
  return math.prod(parts.mesh.shape[name] for name in parts.experiment.sharding.rules[axis])


def vocabulary(parts: program.Program) -> int:
  """Ids, padding included."""
  hidden_BTD = jax.ShapeDtypeStruct((1, 1, parts.experiment.model.dim), 'float32')
  unembed = lambda params, hidden_BTD: parts.free_model.apply({'params': params}, hidden_BTD, method='unembed')  # noqa: E731
  return jax.eval_shape(unembed, parts.abstract.params, hidden_BTD).shape[-1]


def logits_bytes(parts: program.Program, tokens: Tokens) -> int:
  vocab, split = vocabulary(parts), ways(parts, axes.VOCAB)
  most = losses.chunk_length(tokens.rows, vocab)
  itemsize = compute_itemsize(parts.experiment.model)
  at_once = tokens.rows * min(most, tokens.length) * vocab // split * (2 * FLOAT + itemsize)
  if most >= tokens.length:
    return at_once
  return at_once + 2 * FLOAT * parts.experiment.model.dim * vocab // split  # the output layer whole, and the sum of its gradient


def layer_of(parts: program.Program) -> Layer:
  c = parts.experiment.training
  if build.carries(parts.experiment.model):
    return lstm_layer(parts.experiment.model)
  kernel = build.kernel_of(parts.model, c.sequence_length, c.mask_documents)
  return transformer_layer(parts.experiment.model, kernel, c.sequence_length, ways(parts, axes.HEADS), ways(parts, axes.MLP))


def remat_of(config: Any) -> str:
  """none | full | dots; an LSTM has no such field."""
  return getattr(config, 'remat', 'none')


def transformer_layer(config: Any, kernel: str, length: int, head_ways: int = 1, mlp_ways: int = 1) -> Layer:
  """A block's activations, a token.

  Kept are a block's input and, unless it is computed again, what its products and its nonlinear operations were given; and what the
  attention kernel keeps: all weights (plain), those up to the query (causal), a sum a head (cudnn, splash) or nothing (blocks).

  Args:
    config: a TransformerConfig.
    kernel: the one that its training uses.
    length: tokens a row.
    head_ways: devices that share its heads.
    mlp_ways: devices that share its hidden units.
  """
  c, size = config, compute_itemsize(config)
  hidden = (c.hidden_dim or 4 * c.dim) / mlp_ways
  heads = c.num_heads / head_ways
  keys = (c.num_kv_heads or c.num_heads) * (c.dim // c.num_heads) / head_ways
  queries = c.dim / head_ways
  dropped = (2 * c.dim if c.dropout else 0) + (length * heads if c.attention_dropout and kernel == 'plain' else 0)  # masks, a byte each
  ups = (2 if c.activation == 'swiglu' else 1) * hidden
  products = queries + 2 * keys + ups  # what they give
  attention = {
    'plain': (FLOAT + size) * heads * length,
    'causal': size * heads * length / 2 + FLOAT * queries,
    'blocks': 0.0,
  }.get(kernel, FLOAT * heads)
  inside = 3 * c.dim + queries + products + hidden + (queries + keys if c.qk_norm else 0)
  everything = size * inside + attention + dropped
  kept = {'none': everything, 'full': 0.0, 'dots': size * (2 * c.dim + products)}[remat_of(c)]
  slopes = {'plain': 2 * FLOAT * heads * length, 'blocks': 4 * FLOAT * heads * min(length, BLOCK)}.get(kernel, 0.0)
  working = everything - kept + size * max(ups, queries + 2 * keys) + slopes
  return Layer(size * c.dim + kept, working)


def lstm_layer(config: Any) -> Layer:
  """What `models.recurrence` keeps: gates and cells in float32, hidden states; and the gates' gradient, in both types.

  XLA's GPU backend makes room for that gradient in all layers at once, before the first of them is made.
  """
  size = compute_itemsize(config)
  slopes = 4 * FLOAT
  dropped = (size + 1 if config.dropout else 0) + (4 * FLOAT + FLOAT + size)
  early = slopes if backend.name() == 'gpu' else 0
  return Layer((dropped + early) * config.dim, (slopes - early + 4 * size + FLOAT) * config.dim)


def weights_bytes(parts: program.Program) -> int:
  """Copies of parameters for products, in their type.

  Where each device has all that it multiplies, those of all layers. On an fsdp mesh, whole: the layer at work, the next one, which is
  gathered meanwhile, and the gradient that is not yet scattered; and the tables, that of tokens looked up whole.
  """
  itemsize = compute_itemsize(parts.experiment.model)
  leaves = zip(trees.named_leaves(parts.abstract.params), jax.tree.leaves(parts.shardings.params), strict=True)
  modules: collections.Counter[str] = collections.Counter()
  is_gathered, tables = False, 0
  rows = parts.experiment.sharding.rules[axes.BATCH]
  for (name, leaf), place in leaves:
    split = {axis for axis in axes_of(place) if parts.mesh.shape[axis] > 1}
    size = itemsize * leaf.size // math.prod(parts.mesh.shape[axis] for axis in split if axis not in rows)
    is_gathered |= bool(split & set(rows))
    if is_table(name):
      tables += size
    else:
      modules[name.partition('/')[0]] += size
  if not is_gathered:
    return modules.total() + tables if itemsize < FLOAT else 0
  return 3 * max(modules.values()) + tables


def axes_of(place: NamedSharding) -> set[str]:
  """The mesh axes that an array is split over."""
  return {axis for split in place.spec if split for axis in ([split] if isinstance(split, str) else split)}
