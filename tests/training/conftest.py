import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from textgen_jax.data import windows
from textgen_jax.models import build, lstm, transformer
from textgen_jax.training import health, state

CONFIGS = {
  # vocab_multiple: 11 ids are padded to 12, so that -inf stands among the logits.
  'transformer': transformer.TransformerConfig(dim=16, num_layers=1, num_heads=2, vocab_multiple=4),
  'lstm': lstm.LSTMConfig(dim=16, num_layers=2, tied_embedding=False, vocab_multiple=4),
}
VOCAB_SIZE = 11
LENGTH = 6


# Not of the package: without an __init__.py that would last until the session ends, and other tests round otherwise then.
@pytest.fixture(scope='module', autouse=True)
def quick_compiles():
  # Most of these tests' time would be XLA's.
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='session')
def make_model():
  def make(kind, vocab_size=VOCAB_SIZE):
    return build.build(dataclasses.replace(CONFIGS[kind]), vocab_size, LENGTH)

  return make


@pytest.fixture(params=list(CONFIGS))
def model(request, make_model):
  return make_model(request.param)


@pytest.fixture(scope='session')
def make_params():
  def make(model, seed=0):
    """Parameters far from their init, where whole branches are zero."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.PRNGKey(0), jnp.zeros((1, 2), jnp.int32), method='init_everything'))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
      around = 1.0 if path[-1].key == 'scale' else 0.0
      return jnp.asarray(around + 0.3 * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(shapes)['params'])

  return make


@pytest.fixture(scope='session')
def make_state():
  def make(params, tx, carry=None, seed=0):
    zero = jnp.zeros((), jnp.int32)
    return state.TrainState(
      step=zero,
      updates=zero,
      data_offset=zero,
      root_key=jax.random.PRNGKey(seed),
      health=health.fresh(),
      params=params,
      trained=None,
      opt_state=tx.init(params),
      carry=carry,
    )

  return make


@pytest.fixture(scope='session')
def make_batch():
  def make(rows, length=LENGTH, seed=0, starts=False):
    """Random text; weights that differ from token to token, and one row of 0."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB_SIZE, (rows, length + 1)).astype(np.int32)
    weights = rng.choice([0.0, 0.25, 1.0], (rows, length)).astype(np.float32)
    weights[-1] = 0
    starts_BT = rng.random((rows, length)) < 0.2 if starts else None
    return windows.Batch(tokens[:, :-1], tokens[:, 1:], weights, starts_BT)

  return make


@pytest.fixture(scope='session')
def recorder():
  """An optimizer whose state is the last gradient."""
  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params), lambda gradient, state, params=None: (gradient, gradient)
  )
