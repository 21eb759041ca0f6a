"""Says where in a step numbers first stop being finite.

The batch is run once more, outside of the step that was compiled to be fast: forward, with a flag for each module's
output in the order in which they were computed, and backward, with a flag for each parameter's gradient.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from textgen_jax import trees
from textgen_jax.models import base
from textgen_jax.training import step

FLAGS = 'finite_outputs'  # the collection, and the name in it; no module may bear it
WATCHED = ('__call__', 'attend')  # methods of modules that compute something from the tokens


class Found(NamedTuple):
  """Flags of one micro-batch, in trees; True where all is finite."""

  params: Any
  carry: jax.Array
  outputs: Any  # of the modules up to the hidden states
  logits: Any  # of those that make logits of them
  nll: jax.Array
  sown_loss: jax.Array  # what modules have sown as losses
  extra: jax.Array  # the hook's term
  largest: Any  # each gradient's largest magnitude, NaN or infinity where it isn't finite
  largest_without_hook: Any


def make_diagnose(
  model: base.LanguageModel, hook: step.LossHook, accumulation_steps: int, product_dtype: str = 'float32'
) -> Callable[[Any, Any, Any, jax.Array], str]:
  """A function of (params, carry, batch, the step's key) that tells in words what isn't finite first.

  Nothing that is passed is changed or donated. It compiles at its first call.
  """
  orders: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
  examine = jax.jit(lambda *args: _examine(model, hook, orders, *args))

  def diagnose(params: Any, carry: Any, batch: Any, key: jax.Array) -> str:
    for micro_batch, micro_carry, micro_key in step.each_micro_batch(accumulation_steps, batch, carry, key):
      with base.operands(product_dtype):
        found = jax.device_get(examine(params, micro_carry, micro_batch, micro_key))
      said = _describe(found, orders, hooked=hook is not step.no_hook)
      if said:
        return said
    return 'run again, with the parameters as they are now, all is finite'

  return diagnose


def _examine(model: Any, hook: Any, orders: Any, params: Any, carry: Any, batch: Any, key: jax.Array) -> Found:
  for order in orders:
    order.clear()

  def watched(params: Any) -> tuple[jax.Array, Any]:
    with nn.intercept_methods(_watcher(orders[0])):
      terms = step.loss_terms(model, hook, params, carry, batch, key, ('intermediates', FLAGS))
    with nn.intercept_methods(_watcher(orders[1])):
      _, logits = model.apply({'params': params}, terms.hidden_BTD, method='unembed', mutable=[FLAGS])
    flags = terms.sown.get(FLAGS, {}), logits.get(FLAGS, {}), _finite(terms.nll_BT)
    return terms.objective, (*flags, _finite(terms.sown_loss), _finite(terms.extra))

  def plain(params: Any) -> jax.Array:
    return step.loss_terms(model, step.no_hook, params, carry, batch, key).objective

  grads, flags = jax.grad(watched, has_aux=True)(params)
  largest = jax.tree.map(lambda g: jnp.abs(g).max(), (grads, jax.grad(plain)(params)))
  return Found(jax.tree.map(_finite, params), _finite(carry), *flags, *largest)


def _finite(tree: Any) -> jax.Array:
  leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
  return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all() if leaves else jnp.ones((), bool)


def _watcher(order: list[tuple[str, int]]) -> Any:
  """Sows a flag beside each module's output, and notes in which order; flags leave `remat` and other lifted code that way."""

  def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    output = call(*args, **kwargs)
    module = context.module
    if context.method_name in WATCHED and module.path and module.sow(FLAGS, FLAGS, _finite(output)):
      order.append(('/'.join(module.path), len(module.get_variable(FLAGS, FLAGS)) - 1))
    return output

  return watch


def _describe(found: Found, orders: Any, *, hooked: bool) -> str:
  """What isn't finite first, and '' where all is."""
  orders = [_of_each_layer(order, found.params) for order in orders]
  causes = [f'parameter {name} is not finite' for name, good in trees.named_leaves(found.params) if not good][:1]
  if not found.carry:
    causes.append('the carried state is not finite')
  activation = _first_bad(found.outputs, orders[0]) or _first_bad(found.logits, orders[1])
  if activation:
    causes.append(f"the first activation that is not finite is {activation}'s")
  elif not found.nll:
    causes.append('all activations are finite, and the loss of a token is not')
  elif not found.sown_loss:
    causes.append('all activations and losses of tokens are finite; what modules have sown as losses is not')
  elif not found.extra:
    causes.append('all activations and losses of tokens are finite; the term of the loss hook is not')
  else:
    causes += _describe_gradients(found, [*orders[0], *orders[1]], hooked)
  return '; '.join(causes)


def _of_each_layer(order: list[tuple[str, int]], params: Any) -> list[tuple[str, int]]:
  """Calls in a loop over layers, whose paths bear a star for the layer's number, as those of one layer after another."""
  found: list[tuple[str, int]] = []
  for looped, calls in itertools.groupby(order, key=lambda call: '*' in call[0]):
    part = list(calls)
    layers = sum(name.startswith(part[0][0].partition('*')[0]) for name in params) if looped else 1
    found += [(path.replace('*', str(n), 1), count) for n in range(layers) for path, count in part]
  return found


def _first_bad(flags: Any, order: list[tuple[str, int]]) -> str | None:
  sown = dict(trees.named_leaves(flags))
  return next((path for path, count in order if not sown.get(f'{path}/{FLAGS}/{count}', True)), None)


def _describe_gradients(found: Found, order: list[tuple[str, int]], hooked: bool) -> list[str]:
  largest, plain = dict(trees.named_leaves(found.largest)), dict(trees.named_leaves(found.largest_without_hook))
  last_called = {path: place for place, (path, _) in enumerate(order)}
  backward = sorted(largest, key=lambda name: last_called.get(name.rpartition('/')[0], -1), reverse=True)
  bad = [name for name in backward if not np.isfinite(largest[name])]
  if bad:
    if hooked and all(map(np.isfinite, plain.values())):
      return [f"activations and loss are finite; the gradient of the loss hook's term is not, first in that of {bad[0]}"]
    return [f'activations and loss are finite; the gradient of {bad[0]} is not (the first in backward order)']
  # The squares of numbers of this size overflow float32 when they are summed.
  if max(largest.values(), default=0.0) > 1e18:
    name = max(largest, key=largest.__getitem__)
    whose = "; it comes from the loss hook's term" if hooked and max(plain.values()) <= 1e18 else ''
    return [f'activations and gradients are finite, but their norm overflows: that of {name} goes up to {largest[name]:.1e}{whose}']
  return []
