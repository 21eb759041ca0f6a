"""Other libraries' models with the same weights. See tests/fixtures/make_references.py."""

import pathlib

import gpt2_weights
import jax
import numpy as np
import pytest

from textgen_jax.models import build, lstm, transformer

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures'


def load(name):
  with np.load(FIXTURES / name) as file:
    return dict(file)


def logits(model, params, tokens_BT):
  run = jax.jit(lambda params: model.apply({'params': params}, tokens_BT, method='init_everything'))
  return run(params)


def test_gpt2():
  file = load('gpt2.npz')
  tokens_BT, expected_BTV = file.pop('tokens'), file.pop('logits')
  model = build.build(gpt2_weights.config(dim=24, num_layers=3, num_heads=4), 61, 32)
  params = gpt2_weights.fill(model, gpt2_weights.rename(file, 3))
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
  params = gpt2_weights.fill(model, llama_params(file, 2))
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
