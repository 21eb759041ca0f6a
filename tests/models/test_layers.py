import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from textgen_jax import axes
from textgen_jax.models import build, layers, transformer

rng = np.random.default_rng(0)


@pytest.mark.parametrize('shape', [(3, 4), (2, 3, 4), (2, 3, 2, 4)])
@pytest.mark.parametrize('use_bias', [False, True])
def test_dense(shape, use_bias):
  x = rng.normal(size=shape).astype(np.float32)
  params = {'kernel': rng.normal(size=(4, 5)).astype(np.float32)} | ({'bias': np.arange(5.0, dtype=np.float32)} if use_bias else {})
  dense = layers.Dense(5, (axes.EMBED, axes.MLP), nn.initializers.lecun_normal(), use_bias)
  expected = np.einsum('...d,df->...f', x, params['kernel']) + (np.arange(5.0) if use_bias else 0)
  np.testing.assert_allclose(dense.apply({'params': params}, x), expected, rtol=1e-5, atol=1e-5)
  assert set(dense.init(jax.random.PRNGKey(0), x)['params']) == set(params)


def test_embed_looks_up_and_multiplies_one_table():
  table_VD = rng.normal(size=(5, 3)).astype(np.float32)
  embed = layers.Embed(5, 3, axes.VOCAB, nn.initializers.normal(0.02))
  variables = {'params': {'embedding': table_VD}}
  ids_BT = np.array([[0, 4, 1], [2, 2, 3]])
  x_BTD = embed.apply(variables, ids_BT)
  np.testing.assert_array_equal(x_BTD, table_VD[ids_BT])
  np.testing.assert_allclose(embed.apply(variables, x_BTD, method='attend'), table_VD[ids_BT] @ table_VD.T, rtol=1e-5, atol=1e-6)


def test_norms_by_hand():
  x_BTD = np.array([[[3, 4, 0, 0]], [[1, 1, 1, 5]]], np.float32)
  scale, bias = np.array([1, 2, 3, 4], np.float32), np.array([0, 0, 1, 1], np.float32)
  actual = layers.rms_norm(None, axis=None, dtype='float32').apply({'params': {'scale': scale}}, x_BTD)
  np.testing.assert_allclose(actual, x_BTD / np.array([2.5, 7**0.5])[:, None, None] * scale, rtol=1e-5)
  norm = layers.layer_norm(None, use_bias=True, dtype='float32')
  actual = norm.apply({'params': {'scale': scale, 'bias': bias}}, x_BTD)
  centred, std = x_BTD - np.array([1.75, 2])[:, None, None], np.array([3.1875**0.5, 3**0.5])[:, None, None]
  np.testing.assert_allclose(actual, centred / std * scale + bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  'norm', [layers.rms_norm(None, axis=None, dtype='float32'), layers.layer_norm(None, use_bias=False, dtype='float32')]
)
def test_norms_epsilon(norm):
  x = np.array([[1e-3, -1e-3], [2e-3, -2e-3]], np.float32)  # mean squares of 1e-6 and 4e-6, beside an epsilon of 1e-5
  actual = norm.apply({'params': {'scale': np.ones(2, np.float32)}}, x)
  np.testing.assert_allclose(actual, x / np.sqrt([[1.1e-5], [1.4e-5]]), rtol=1e-4)


def test_padding_of_the_vocabulary():
  assert [layers.padded_size(65, multiple) for multiple in (1, 2, 64, 65, 100)] == [65, 66, 128, 65, 100]
  logits = np.arange(8, dtype=np.float32).reshape(2, 1, 4)
  np.testing.assert_array_equal(layers.hide_padding(jnp.asarray(logits), 4), logits)
  hidden = layers.hide_padding(jnp.asarray(logits, jnp.bfloat16), 3)
  assert hidden.dtype == jnp.float32
  np.testing.assert_array_equal(hidden, np.where(np.arange(4) < 3, logits, -np.inf))


def test_auto_dtype_follows_the_hardware(monkeypatch):
  for backend, dtype in (('cpu', 'float32'), ('gpu', 'bfloat16'), ('tpu', 'bfloat16')):
    monkeypatch.setattr(jax, 'default_backend', lambda backend=backend: backend)
    assert layers.resolve_dtype('auto') == dtype
  assert layers.resolve_dtype('float32') == 'float32'
  assert layers.resolve_dtype('bfloat16') == 'bfloat16'


def test_soft_cap():
  logits_BTV = jnp.asarray([[[-1000.0, -1.0, 0.0, 0.01, 1.0, 1000.0]]])
  capped = np.asarray(layers.soft_cap(logits_BTV, 15.0))[0, 0]
  np.testing.assert_allclose(capped, 15 * np.tanh(np.array([-1000, -1, 0, 0.01, 1, 1000]) / 15), rtol=1e-6)
  assert np.abs(capped).max() <= 15


def test_logits_of_a_model_are_capped(random_params):
  sizes = {'dim': 16, 'num_layers': 1, 'num_heads': 2, 'vocab_multiple': 4}
  plain, capped = (build.build(transformer.TransformerConfig(**sizes, logit_softcap=cap), 7, 8) for cap in (0.0, 2.0))
  params = random_params(plain)
  hidden_BTD = 5 * jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 16)), jnp.float32)
  one, other = (model.apply({'params': params}, hidden_BTD, method='unembed') for model in (plain, capped))
  assert jnp.abs(one[..., :7]).max() > 3
  np.testing.assert_allclose(other[..., :7], 2 * np.tanh(np.asarray(one[..., :7]) / 2), rtol=1e-5)
  assert (other[..., 7:] == -jnp.inf).all()
