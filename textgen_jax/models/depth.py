"""A Transformer's depth: which results of its blocks are kept for the backward pass, and all blocks as one compiled loop."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import core
from flax import linen as nn
from jax.sharding import PartitionSpec

from textgen_jax.models import base

# What `model.remat` may be: what a block keeps beside its input. none: all that its backward pass reads. full: nothing, so that the
# block is computed again. dots: what products with kernels give, so that norms, activations and the weights of attention are.
REMAT: dict[str, Callable[..., Any]] = {
  'none': jax.checkpoint_policies.everything_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

EVERY = 'block_*'  # the one block that stands for all of them in a loop


def block_class(cls: type[nn.Module], remat: str) -> type[nn.Module]:
  """A block's class that keeps what `remat` says; the fourth argument, after the module, isn't traced."""
  return cls if remat == 'none' else nn.remat(cls, static_argnums=(4,), policy=REMAT[remat])


def scan(
  model: nn.Module,
  blocks: Sequence[nn.Module],
  make_block: Callable[[core.Scope], Any],
  remat: str,
  constrain: base.Constrain,
  x_BTD: jax.Array,
  *inputs: Any,
) -> jax.Array:
  """`blocks` one after another, as a loop whose program is that of one block, so that it compiles in the same time for any number.

  Parameters stay each block's own: they are stacked at each call, which takes a copy of them. What blocks sow is theirs
  as well. Dropout takes others than without the loop. Blocks must do alike: none can know its number.

  Args:
    model: whose blocks they are, bound.
    blocks: in their order.
    make_block: makes one that isn't of the model, in a scope.
    remat: a name of `REMAT`.
    constrain: the model's.
    x_BTD: what the first block reads.
    inputs: what each block gets beside it.

  Raises:
    ValueError: blocks have variables that aren't parameters, such as what another call has sown.
  """
  assert model.scope is not None
  variables = [dict(block.variables) for block in blocks]
  params = [own.pop('params') for own in variables]
  if left := sorted({name for own in variables for name, content in own.items() if content}):
    raise ValueError(f'model.scan_layers=True stacks parameters alone, and blocks have variables of the kinds {", ".join(left)}')
  mutable = core.scope.subtract_filters(model.scope.mutable, 'params')

  def call(scope: core.Scope, x_BTD: jax.Array) -> jax.Array:
    return make_block(scope.push(EVERY))(x_BTD, *inputs)[0]

  def layer(x_BTD: jax.Array, own: Any) -> tuple[jax.Array, Any]:
    params, keys = own
    x_BTD, sown = core.apply(call, mutable)({'params': {EVERY: params}}, x_BTD, rngs=keys)
    return x_BTD, {kind: content[EVERY] for kind, content in sown.items() if EVERY in content}

  if remat != 'none':
    layer = jax.checkpoint(layer, prevent_cse=False, policy=REMAT[remat])  # a loop is barrier enough
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
  if constrain is not base.unconstrained:
    stacked = _as_params_lie(stacked, call, constrain, x_BTD)
  keys = {name: jax.random.split(model.make_rng(name), len(blocks)) for name in model.scope.rngs}
  x_BTD, sown = jax.lax.scan(layer, x_BTD, (stacked, keys))
  for i, block in enumerate(blocks):
    for kind, content in sown.items():
      for name, value in content.items():
        block.put_variable(kind, name, jax.tree.map(lambda x, i=i: jax.lax.index_in_dim(x, i, keepdims=False), value))
  return x_BTD


def _as_params_lie(stacked: Any, call: Callable[..., Any], constrain: base.Constrain, x_BTD: jax.Array) -> Any:
  """Each layer's part split as its parameters are, so that no device ever holds all layers whole."""
  shapes = jax.eval_shape(lambda key, x_BTD: core.init(call, ['params'])(key, x_BTD)[1], jax.random.PRNGKey(0), x_BTD)
  specs = nn.get_partition_spec(shapes)['params'][EVERY]

  def split(spec: PartitionSpec, x: jax.Array) -> jax.Array:
    names = (None, *spec)
    return constrain(x, (*names, *(None,) * (x.ndim - len(names))))

  return jax.tree.map(split, specs, stacked, is_leaf=lambda x: isinstance(x, PartitionSpec))
