"""The contract of a language model, and what can be done to any model's cache.

A model is a linen module with these methods:

  cache = model.init_cache(batch, length, rewinds=0)
  hidden_BTD, cache = model.apply(variables, tokens_BT, cache=None, valid_BT=None, starts_BT=None,
                                  deterministic=True, rngs=...)
  logits_BTV = model.apply(variables, hidden_BTD, method='unembed')
  cache = model.grow_cache(cache, length)
  cache = model.rewind(cache, steps_B)

`tokens_BT` are ids, `valid_BT` is False where a token is padding and must leave no
trace (its id must still be one of the vocabulary), `starts_BT` is True at a document's
first token: nothing before it is seen.
`deterministic=False` turns dropout on and needs `rngs={'dropout': key}`. Without a
cache the call starts from nothing and returns None in its place; with one it goes on
where the cache stands. A cache is a pytree whose every leaf leads with B.
`rewind` takes back each row's last `steps_B` places, valid or not, none of which may
start a document: at most `rewinds` of them since the cache was begun or rewound.
`unembed` gives -inf to the ids that only pad the vocabulary. Two methods more:
`init_everything(tokens_BT)`, for `init`, touches every parameter, and
`mixing_flops_per_token(length)` counts forward operations between tokens.

Two attributes tell a caller what happens past the trained context:
`context_length` (tokens), and `slides`: True where the caller must read the last part
of the context anew to go on (learned positions), False where the model just goes on.
`window` is how many tokens of cache can ever matter (None: the cache has no length).
Once its ring has come round, a cache of window + chunk - 1 slots holds the window only
if no invalid token came after a row's first valid one, for each takes a slot.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from textgen_jax import trees
from textgen_jax.models import products

Cache = Any
operand_dtype, operands = products.operand_dtype, products.operands  # of a training step's products
MIN_TURNS = products.MIN_TURNS  # of a loop, from which on `step_in_loop` prepares the parameters for it
# What models call on activations. Over a mesh it also has `ways` and `split` (`sharding.MeshConstrain`).
Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]


class LanguageModel(Protocol):
  """What training, scoring and sampling know of a model. See the module's docstring."""

  vocab_size: int  # without padding
  context_length: int

  @property
  def slides(self) -> bool: ...

  @property
  def window(self) -> int | None: ...

  def __hash__(self) -> int: ...

  def init(self, *args: Any, **kwargs: Any) -> Any: ...

  def init_everything(self, tokens_BT: jax.Array) -> jax.Array: ...

  def apply(self, *args: Any, **kwargs: Any) -> Any: ...

  def init_cache(self, batch: int, length: int, rewinds: int = 0) -> Cache: ...

  def grow_cache(self, cache: Cache, length: int) -> Cache: ...

  def rewind(self, cache: Cache, steps_B: jax.Array) -> Cache: ...

  def mixing_flops_per_token(self, length: int) -> int: ...


def unconstrained(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
  """The identity: on one device, or outside a mesh, nothing is constrained."""
  del names
  return x


def init_params(model: LanguageModel, key: jax.Array) -> Any:
  """Fresh parameters, boxed with the names of their axes."""
  return model.init(key, jnp.zeros((1, 2), jnp.int32), method='init_everything')['params']


def step_in_loop(model: LanguageModel, params: Any, token_B: jax.Array, cache: Cache, turns: int) -> tuple[jax.Array, Cache]:
  """The logits that follow each row's token, [B, V], in the body of a loop of about so many turns."""
  with products.loop_body(turns):
    hidden_BTD, cache = model.apply({'params': params}, token_B[:, None], cache=cache)
    return model.apply({'params': params}, hidden_BTD, method='unembed')[:, 0], cache


def reorder_cache(cache: Cache, rows_B: ArrayLike) -> Cache:
  """The cache whose row b is the given cache's row `rows_B[b]`; rows may repeat or be left out."""
  return jax.tree.map(lambda leaf: jnp.take(leaf, rows_B, axis=0), cache)


def flops_per_token(model: LanguageModel, params: Any, length: int) -> int:
  """Floating-point operations to train on one token, backward pass included.

  Two a weight of each matrix product forward and four backward, and the products
  between tokens, counted whole although half of them are masked.
  Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
  """
  weights = sum(leaf.size for name, leaf in _matrices(params))
  return 6 * weights + 3 * model.mixing_flops_per_token(length)


def _matrices(params: Any) -> list[tuple[str, Any]]:
  leaves = trees.named_leaves(params)
  untied = any('unembed' in name for name, _ in leaves)
  # A lookup costs nothing; a table that is tied is multiplied once, as the output layer.
  return [(n, x) for n, x in leaves if n.endswith('kernel') or (n.endswith('embed/embedding') and not untied)]
