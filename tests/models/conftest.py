import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from textgen_jax import trees


@pytest.fixture(scope='session')
def random_params():
  """Params in which every leaf matters: output projections, for one, are zero at init."""

  def make(model, seed=0, std=0.3):
    shapes = nn.unbox(jax.eval_shape(lambda: model.init(jax.random.PRNGKey(0), jnp.zeros((1, 2), jnp.int32), method='init_everything')))
    rng = np.random.default_rng(seed)

    def fill(name, leaf):
      return jnp.asarray(rng.normal(name.endswith('scale'), std, leaf.shape), leaf.dtype)

    return trees.map_with_names(fill, shapes['params'])

  return make
