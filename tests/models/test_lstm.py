import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from textgen_jax.models import build, lstm


def test_one_step_by_hand():
  layer = lstm.LSTMLayer(lstm.LSTMConfig(dim=1, forget_bias=1.0), 'float32')
  params = {'input': {'kernel': np.array([[1.0, 2.0, 3.0, 4.0]]), 'bias': np.array([0.1, 0.2, 0.3, 0.4])}}
  params['recurrent_kernel'] = np.array([[-1.0, -2.0, -3.0, -4.0]])
  x_TBD, h_BD, c_BD = np.array([[[0.5], [0.0]]]), np.array([[0.2], [0.0]]), np.array([[-0.7], [2.0]])
  y_TBD, (h, c), _ = layer.apply({'params': params}, x_TBD, (h_BD, c_BD), None, None, True)

  def sigmoid(x):
    return 1 / (1 + np.exp(-x))

  # Gates i, f, g, o of the first row: 0.3 * (1, 2, 3, 4) + biases; of the second: the biases.
  i, f, g, o = np.array([[0.4, 0.8, 1.2, 1.6], [0.1, 0.2, 0.3, 0.4]]).T[..., None]
  expected_c = sigmoid(f + 1) * c_BD + sigmoid(i) * np.tanh(g)
  np.testing.assert_allclose(c, expected_c, rtol=1e-5)
  np.testing.assert_allclose(h, sigmoid(o) * np.tanh(expected_c), rtol=1e-5)
  np.testing.assert_array_equal(y_TBD[0], h)


def test_recurrent_dropout_keeps_one_mask_a_sequence():
  """Gates open, cell forgotten and g = the hidden state: a unit whose state is dropped once stays at zero."""
  dim, time = 64, 12
  layer = lstm.LSTMLayer(lstm.LSTMConfig(dim=dim, recurrent_dropout=0.5), 'float32')
  bias = np.repeat(np.array([20.0, -21.0, 0.0, 20.0], np.float32), dim)
  recurrent = np.zeros((dim, 4 * dim), np.float32)
  recurrent[:, 2 * dim : 3 * dim] = np.eye(dim)
  params = {'input': {'kernel': np.zeros((dim, 4 * dim), np.float32), 'bias': bias}, 'recurrent_kernel': recurrent}
  carry = (np.full((2, dim), 0.5, np.float32), np.zeros((2, dim), np.float32))
  x_TBD = np.zeros((time, 2, dim), np.float32)
  y_TBD, _, _ = layer.apply({'params': params}, x_TBD, carry, None, None, False, rngs={'dropout': jax.random.PRNGKey(0)})
  alive = np.asarray(y_TBD) > 1e-3
  np.testing.assert_array_equal(alive, np.broadcast_to(alive[0], alive.shape))
  assert 0.3 < alive[0].mean() < 0.7
  assert (alive[0, 0] != alive[0, 1]).any()
  np.testing.assert_allclose(y_TBD[0][alive[0]], np.tanh(np.tanh(2 * 0.5)), rtol=1e-5)  # kept ones are scaled up


def test_init_follows_its_sources():
  dim = 32
  model = build.build(lstm.LSTMConfig(dim=dim, num_layers=2), 300, 8)
  make = jax.jit(
    lambda key: nn.unbox(model.init(key, jnp.zeros((1, 2), jnp.int32), method='init_everything'))['params'],
    compiler_options={'xla_backend_optimization_level': 0},
  )
  params = make(jax.random.PRNGKey(0))

  def assert_uniform(leaf, limit):
    assert 0.98 * limit < np.abs(leaf).max() <= limit
    np.testing.assert_allclose(np.std(leaf), limit / 3**0.5, rtol=0.05)

  assert_uniform(params['embed']['embedding'], 0.1)
  for n in range(2):
    layer = params[f'layer_{n}']
    assert_uniform(layer['input']['kernel'], (6 / (dim + 4 * dim)) ** 0.5)
    np.testing.assert_allclose(layer['recurrent_kernel'] @ layer['recurrent_kernel'].T, np.eye(dim), atol=1e-5)
    np.testing.assert_array_equal(layer['input']['bias'], 0)
