import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from textgen_jax import trees
from textgen_jax.models import base, build, lstm, transformer

V, C, D, N = 29, 16, 16, 2  # vocabulary, context, width, layers

GPT2 = transformer.TransformerConfig(
  dim=D, num_layers=N, num_heads=4, position='learned', norm='layer', activation='gelu', bias=True, tied_embedding=True, qk_norm=False
)
GROUPED = transformer.TransformerConfig(dim=D, num_layers=N, num_heads=4, num_kv_heads=2, hidden_dim=24, activation='swiglu')
RELU2 = transformer.TransformerConfig(dim=D, num_layers=N, num_heads=4, vocab_multiple=8)
TIED = lstm.LSTMConfig(dim=D, num_layers=N)
UNTIED = lstm.LSTMConfig(dim=D, num_layers=N, tied_embedding=False)


def shapes(model):
  init = jax.eval_shape(lambda: model.init(jax.random.PRNGKey(0), jnp.zeros((1, 2), jnp.int32), method='init_everything'))
  return nn.unbox(init)['params']


def test_reorder_cache_moves_every_leaf():
  cache = {'a': np.arange(6).reshape(3, 2), 'b': (np.array([10, 20, 30]),)}
  actual = base.reorder_cache(cache, np.array([2, 0, 0, 1]))
  np.testing.assert_array_equal(actual['a'], [[4, 5], [0, 1], [0, 1], [2, 3]])
  np.testing.assert_array_equal(actual['b'][0], [30, 10, 10, 20])


# Norms, biases and tables besides the matrices; then the matrices themselves.
COUNTS = {
  'gpt2': (GPT2, V * D + C * D + N * (2 * 2 * D + 4 * D + 4 * D + D) + 2 * D, N * (4 * D * D + 2 * D * 64)),
  'grouped': (GROUPED, V * D + N * (2 * D + 2 * 4) + D, N * (2 * D * D + 2 * D * 8 + 3 * D * 24) + V * D),
  'relu2': (RELU2, 32 * D + N * (2 * D + 2 * 4) + D, N * (4 * D * D + 2 * D * 64) + 32 * D),
  'lstm': (TIED, V * D + N * 4 * D, N * 8 * D * D),
  'lstm_untied': (UNTIED, V * D + N * 4 * D, N * 8 * D * D + V * D),
}


@pytest.mark.parametrize(('config', 'others', 'matrices'), COUNTS.values(), ids=COUNTS)
def test_params_and_flops_by_hand(config, others, matrices):
  model = build.build(config, V, C)
  params = shapes(model)
  assert trees.count(params) == others + matrices
  multiplied = matrices + (V * D if config.tied_embedding else 0)
  # Each token meets 10 keys: D products for the scores and D for the sums; forward, and twice that backward.
  mixing = 0 if isinstance(config, lstm.LSTMConfig) else 3 * N * 2 * (2 * D * 10)
  assert base.flops_per_token(model, params, 10) == 6 * multiplied + mixing


def test_gpt2_small_has_its_published_size():
  config = transformer.TransformerConfig(
    dim=768, num_layers=12, num_heads=12, position='learned', norm='layer', activation='gelu', bias=True, tied_embedding=True, qk_norm=False
  )
  assert trees.count(shapes(build.build(config, 50257, 1024))) == 124_439_808
