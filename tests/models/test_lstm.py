import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from textgen_jax.models import build, lstm

quick_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
TOKENS_BT = np.random.default_rng(0).integers(11, size=(3, 9))


def make(**changes):
  """11 words, fewer than it is wide and than there are tokens: products are of the table's rows."""
  return build.build(lstm.LSTMConfig(dim=16, num_layers=2, compute_dtype='float32', **changes), 11, 8)


@functools.partial(quick_jit, static_argnums=0)
def draw(model, params, tokens_BT, key):
  """The output in training, and what was sown."""
  (hidden_BTD, _), sown = model.apply({'params': params}, tokens_BT, deterministic=False, rngs={'dropout': key}, mutable=['losses'])
  return hidden_BTD, {name: sown['losses'][name][0] for name in sown.get('losses', {})}


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


def test_a_table_of_few_words_is_multiplied_in_place_of_the_tokens(random_params):
  """The same outputs and gradients as from the same words in a table too tall for that."""
  small, tall = make(), build.build(make().config, 40, 8)
  params = random_params(small)
  weights_D = np.random.default_rng(1).normal(size=16)

  def total(params, model):
    return (jnp.square(model.apply({'params': params}, TOKENS_BT)[0]) @ weights_D).sum()

  def table(rows):
    return {**params, 'embed': {'embedding': jnp.pad(params['embed']['embedding'], ((0, rows), (0, 0)))}}

  assert 'one_hot' in str(jax.make_jaxpr(jax.grad(functools.partial(total, model=small)))(params))
  value, slopes = quick_jit(jax.value_and_grad(functools.partial(total, model=small)))(params)
  expected, expected_slopes = quick_jit(jax.value_and_grad(functools.partial(total, model=tall)))(table(29))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_array_equal(expected_slopes['embed']['embedding'][11:], 0)
  expected_slopes['embed']['embedding'] = expected_slopes['embed']['embedding'][:11]
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max()), slopes, expected_slopes)


@pytest.mark.parametrize('mask', ['token', 'sequence'])
@pytest.mark.parametrize('name', ['dropout', 'input_dropout'])
def test_a_mask_lasts_a_token_or_a_sequence(name, mask):
  """By what it multiplies: ones."""
  model = make(**{name: 0.4}, dropout_mask=mask).bind({}, rngs={'dropout': jax.random.PRNGKey(0)})
  dropout = model.input_dropout if name == 'input_dropout' else model.output_dropout
  masks_TBD = np.asarray(dropout(jnp.ones((50, 40, 16)), deterministic=False))
  assert (masks_TBD == masks_TBD[0]).all() == (mask == 'sequence')
  assert (masks_TBD[:, 0] != masks_TBD[:, 1]).any()  # another one in each row
  np.testing.assert_allclose(np.unique(masks_TBD), [0, 1 / 0.6], rtol=1e-6)
  assert abs(masks_TBD[0].mean() - 1) < 0.15
  np.testing.assert_array_equal(dropout(masks_TBD, deterministic=True), masks_TBD)


@pytest.mark.parametrize('name', ['weight_dropout', 'embedding_dropout'])
@pytest.mark.parametrize('input_dropout', [0.0, 1e-6])  # with it, a token's row is multiplied, not the table's
def test_a_batch_shares_the_masks_of_weights(name, input_dropout, random_params):
  model = make(**{name: 0.5}, input_dropout=input_dropout)
  params, tokens_BT = random_params(model), TOKENS_BT.copy()
  tokens_BT[1] = tokens_BT[0]
  one, again, other = (np.asarray(draw(model, params, tokens_BT, jax.random.PRNGKey(seed))[0]) for seed in (0, 0, 1))
  np.testing.assert_array_equal(one, again)
  np.testing.assert_allclose(one[0], one[1], rtol=1e-5, atol=1e-6)
  assert np.abs(one - other).max() > 1e-3
  plain = make().apply({'params': params}, tokens_BT)[0]
  np.testing.assert_array_equal(model.apply({'params': params}, tokens_BT)[0], plain)
  assert np.abs(one - plain).max() > 1e-3


def test_weight_dropout_is_a_mask_of_the_kernel_the_same_at_all_times():
  """Gates open and g = tanh of a product with ones: a step's cell is a count of what was kept of the kernel."""
  dim, time, rate = 32, 5, 0.5
  layer = lstm.LSTMLayer(lstm.LSTMConfig(dim=dim, weight_dropout=rate), 'float32')
  bias = np.repeat(np.array([20.0, -21.0, 0.0, 20.0], np.float32), dim)
  recurrent = np.zeros((dim, 4 * dim), np.float32)
  recurrent[:, 2 * dim : 3 * dim] = 0.01
  params = {'input': {'kernel': np.zeros((dim, 4 * dim), np.float32), 'bias': bias}, 'recurrent_kernel': recurrent}
  carry = np.ones((2, dim), np.float32), np.zeros((2, dim), np.float32)
  starts = np.zeros((time, 2), bool)
  y_TBD, _, _ = layer.apply(
    {'params': params}, np.zeros((time, 2, dim), np.float32), carry, None, starts, False, rngs={'dropout': jax.random.PRNGKey(0)}
  )
  seen = [np.arctanh(np.arctanh(np.asarray(y_BD))) / 0.01 * (1 - rate) for y_BD in y_TBD]
  kept_D = np.round(seen[0][0])  # of the 32 weights of a unit
  np.testing.assert_allclose(seen[0], np.tile(kept_D, (2, 1)), atol=1e-2)
  assert len(np.unique(kept_D)) > 4  # not whole units
  assert abs(kept_D.mean() - dim * (1 - rate)) < 3
  # The second step's inputs are the first's outputs, all about equal: another mask would give another order.
  np.testing.assert_array_equal(np.asarray(y_TBD[1])[0], np.asarray(y_TBD[1])[1])
  assert np.corrcoef(seen[1][0], kept_D)[0, 1] > 0.95


@pytest.mark.parametrize('input_dropout', [0.0, 1e-6])
def test_embedding_dropout_drops_whole_words(input_dropout, random_params):
  """A dropped word is read as zeros wherever it stands; the others are scaled up; the output layer keeps them all."""
  model = make(embedding_dropout=0.5, input_dropout=input_dropout)
  params = random_params(model)

  def inputs(model):
    x, ids_TB = model._inputs(TOKENS_BT.T, False)
    return x if ids_TB is None else x[ids_TB]

  x_TBD = np.asarray(nn.apply(inputs, model)({'params': params}, rngs={'dropout': jax.random.PRNGKey(1)}))
  table_VD = np.asarray(params['embed']['embedding'])
  dropped = {}
  for t, b in np.ndindex(x_TBD.shape[:2]):
    word = TOKENS_BT[b, t]
    dropped.setdefault(word, (x_TBD[t, b] == 0).all())
    np.testing.assert_allclose(x_TBD[t, b], 0 if dropped[word] else 2 * table_VD[word], rtol=1e-5)
  assert 0 < sum(dropped.values()) < len(dropped)


def test_penalties_are_those_of_awd_lstm(random_params):
  """AR on the dropped output of the last layer, TAR on what it was before; their means over tokens are the source's means."""
  plain = make(dropout=0.4)
  model = make(dropout=0.4, activation_penalty=2.0, temporal_penalty=3.0)
  params, key = random_params(model), jax.random.PRNGKey(0)
  dropped_BTD, sown = draw(model, params, TOKENS_BT, key)
  np.testing.assert_array_equal(draw(plain, params, TOKENS_BT, key)[0], dropped_BTD)  # a penalty doesn't change what is computed
  assert {name: x.shape for name, x in sown.items()} == {'activation_penalty': (3, 9), 'temporal_penalty': (3, 9)}
  np.testing.assert_allclose(sown['activation_penalty'], 2 * np.square(dropped_BTD).mean(-1), rtol=1e-5)
  undropped, whole = draw(make(temporal_penalty=3.0), params, TOKENS_BT, key)
  changes_BTD = np.diff(np.asarray(undropped), axis=1)
  np.testing.assert_allclose(whole['temporal_penalty'].mean(), 3 * np.square(changes_BTD).mean(), rtol=1e-5)
  np.testing.assert_array_equal(whole['temporal_penalty'][:, 0], 0)
  # That of the dropped output would be larger.
  assert sown['temporal_penalty'].mean() < 3 * np.square(np.diff(np.asarray(dropped_BTD), axis=1)).mean()


def test_nothing_is_sown_in_evaluation(random_params):
  model = make(activation_penalty=2.0, temporal_penalty=3.0)
  _, sown = model.apply({'params': random_params(model)}, TOKENS_BT, mutable=['losses'])
  assert not sown
  assert not draw(make(), random_params(model), TOKENS_BT, jax.random.PRNGKey(0))[1]
