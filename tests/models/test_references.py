"""Other libraries' models with the same weights. See tests/fixtures/make_references.py."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from textgen_jax import trees
from textgen_jax.models import build, lstm, transformer

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures'


def load(name):
  with np.load(FIXTURES / name) as file:
    return dict(file)


def fill(model, found):
  """Params from arrays by name; every array is used and every param set."""
  shapes = nn.unbox(jax.eval_shape(lambda: model.init(jax.random.PRNGKey(0), jnp.zeros((1, 2), jnp.int32), method='init_everything')))

  def take(name, leaf):
    array = found.pop(name)
    assert array.shape == leaf.shape, name
    return jnp.asarray(array)

  params = trees.map_with_names(take, shapes['params'])
  assert not found
  return params


def logits(model, params, tokens_BT):
  run = jax.jit(lambda params: model.apply({'params': params}, tokens_BT, method='init_everything'))
  return run(params)


def gpt2_params(file, num_layers):
  found = {'embed/embedding': file.pop('transformer.wte.weight'), 'position/embedding': file.pop('transformer.wpe.weight')}

  def copy(theirs, ours, weight):
    found[f'{ours}/{weight}'], found[f'{ours}/bias'] = file.pop(f'transformer.{theirs}.weight'), file.pop(f'transformer.{theirs}.bias')

  for n in range(num_layers):
    for theirs, ours in (('ln_1', 'attention_norm'), ('ln_2', 'mlp_norm')):
      copy(f'h.{n}.{theirs}', f'block_{n}/{ours}', 'scale')
    for theirs, ours in (('attn.c_proj', 'attention/output'), ('mlp.c_fc', 'mlp/up'), ('mlp.c_proj', 'mlp/down')):
      copy(f'h.{n}.{theirs}', f'block_{n}/{ours}', 'kernel')
    for ours, theirs in (('kernel', 'weight'), ('bias', 'bias')):
      parts = np.split(file.pop(f'transformer.h.{n}.attn.c_attn.{theirs}'), 3, axis=-1)
      found |= {f'block_{n}/attention/{name}/{ours}': part for name, part in zip(('query', 'key', 'value'), parts, strict=True)}
  copy('ln_f', 'final_norm', 'scale')
  return found


def test_gpt2():
  config = transformer.TransformerConfig(
    dim=24,
    num_layers=3,
    num_heads=4,
    position='learned',
    norm='layer',
    activation='gelu',
    qk_norm=False,
    bias=True,
    tied_embedding=True,
    compute_dtype='float32',
  )
  file = load('gpt2.npz')
  tokens_BT, expected_BTV = file.pop('tokens'), file.pop('logits')
  model = build.build(config, 61, 32)
  params = fill(model, gpt2_params(file, 3))
  assert not file
  np.testing.assert_allclose(logits(model, params, tokens_BT), expected_BTV, rtol=0, atol=5e-5)


LLAMA = {
  'self_attn.q_proj': 'attention/query',
  'self_attn.k_proj': 'attention/key',
  'self_attn.v_proj': 'attention/value',
  'self_attn.o_proj': 'attention/output',
  'mlp.gate_proj': 'mlp/gate',
  'mlp.up_proj': 'mlp/up',
  'mlp.down_proj': 'mlp/down',
}


def llama_params(file, num_layers):
  found = {'embed/embedding': file.pop('model.embed_tokens.weight'), 'unembedding/kernel': file.pop('lm_head.weight').T}
  for n in range(num_layers):
    for theirs, ours in LLAMA.items():
      found[f'block_{n}/{ours}/kernel'] = file.pop(f'model.layers.{n}.{theirs}.weight').T
    for theirs, ours in (('input_layernorm', 'attention_norm'), ('post_attention_layernorm', 'mlp_norm')):
      found[f'block_{n}/{ours}/scale'] = file.pop(f'model.layers.{n}.{theirs}.weight')
  found['final_norm/scale'] = file.pop('model.norm.weight')
  return found


def test_llama():
  config = transformer.TransformerConfig(
    dim=24, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=40, activation='swiglu', qk_norm=False, compute_dtype='float32'
  )
  file = load('llama.npz')
  tokens_BT, expected_BTV = file.pop('tokens'), file.pop('logits')
  model = build.build(config, 61, 32)
  params = fill(model, llama_params(file, 2))
  assert not file
  np.testing.assert_allclose(logits(model, params, tokens_BT), expected_BTV, rtol=0, atol=5e-5)


@pytest.mark.parametrize('steps', [17, 5])
def test_lstm(steps):
  """Layer by layer, since the reference's input isn't tokens; in one call, and in parts that hand the carry on."""
  file = load('lstm.npz')
  x, outputs, h0, c0, hn, cn = (file.pop(name) for name in ('x', 'outputs', 'h0', 'c0', 'hn', 'cn'))
  layer = lstm.LSTMLayer(lstm.LSTMConfig(dim=12, forget_bias=0.0), 'float32')
  x_TBD = x.swapaxes(0, 1)
  for n in range(2):
    w_ih, w_hh, b_ih, b_hh = (file.pop(f'{name}_l{n}') for name in ('weight_ih', 'weight_hh', 'bias_ih', 'bias_hh'))
    params = {'input': {'kernel': w_ih.T, 'bias': b_ih + b_hh}, 'recurrent_kernel': w_hh.T}
    run = jax.jit(lambda x_TBD, carry, params=params: layer.apply({'params': params}, x_TBD, carry, None, None, True))
    carry, parts = (h0[n], c0[n]), []
    for low in range(0, 17, steps):
      y_TBD, carry, _ = run(x_TBD[low : low + steps], carry)
      parts.append(y_TBD)
    x_TBD = np.concatenate(parts)
    np.testing.assert_allclose(carry[0], hn[n], rtol=0, atol=1e-5)
    np.testing.assert_allclose(carry[1], cn[n], rtol=0, atol=1e-5)
  assert not file
  np.testing.assert_allclose(x_TBD.swapaxes(0, 1), outputs, rtol=0, atol=1e-5)
