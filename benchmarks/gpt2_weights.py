"""GPT-2's weights, by the names that Hugging Face gives them, in our model; the tests of its logits use it too."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from textgen_jax import trees
from textgen_jax.models import transformer


def config(dim: int, num_layers: int, num_heads: int) -> transformer.TransformerConfig:
  """GPT-2's style: learned positions, layer norm, tanh GELU, biases, one table for input and output."""
  return transformer.TransformerConfig(
    dim=dim,
    num_layers=num_layers,
    num_heads=num_heads,
    position='learned',
    norm='layer',
    activation='gelu',
    qk_norm=False,
    bias=True,
    tied_embedding=True,
    compute_dtype='float32',
  )


def rename(weights: dict[str, np.ndarray], num_layers: int) -> dict[str, np.ndarray]:
  """The weights under our names; takes them out of `weights`, so that what stays there isn't GPT-2's."""
  found = {'embed/embedding': weights.pop('transformer.wte.weight'), 'position/embedding': weights.pop('transformer.wpe.weight')}

  def copy(theirs: str, ours: str, weight: str) -> None:
    found[f'{ours}/{weight}'], found[f'{ours}/bias'] = (weights.pop(f'transformer.{theirs}.{part}') for part in ('weight', 'bias'))

  for n in range(num_layers):
    for theirs, ours in (('ln_1', 'attention_norm'), ('ln_2', 'mlp_norm')):
      copy(f'h.{n}.{theirs}', f'block_{n}/{ours}', 'scale')
    for theirs, ours in (('attn.c_proj', 'attention/output'), ('mlp.c_fc', 'mlp/up'), ('mlp.c_proj', 'mlp/down')):
      copy(f'h.{n}.{theirs}', f'block_{n}/{ours}', 'kernel')
    for ours, theirs in (('kernel', 'weight'), ('bias', 'bias')):
      parts = np.split(weights.pop(f'transformer.h.{n}.attn.c_attn.{theirs}'), 3, axis=-1)
      found |= {f'block_{n}/attention/{name}/{ours}': part for name, part in zip(('query', 'key', 'value'), parts, strict=True)}
  copy('ln_f', 'final_norm', 'scale')
  return found


def fill(model: Any, found: dict[str, np.ndarray]) -> Any:
  """Params from arrays by our names; every array is used and every param set."""
  shapes = nn.unbox(jax.eval_shape(lambda: model.init(jax.random.PRNGKey(0), jnp.zeros((1, 2), jnp.int32), method='init_everything')))

  def take(name: str, leaf: Any) -> jax.Array:
    array = found.pop(name)
    assert array.shape == leaf.shape, name
    return jnp.asarray(array)

  params = trees.map_with_names(take, shapes['params'])
  assert not found, sorted(found)
  return params
