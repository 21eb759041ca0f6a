"""Products of few rows on CPU: the same numbers, and a kernel that is written out once for all turns of a loop."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from textgen_jax import backend
from textgen_jax.models import build, lstm, products, transformer

ROWS, K, N = 4, 320, 512
VOCAB = 29


@pytest.fixture
def any_size(monkeypatch):
  """Kernels of tests are small ones."""
  monkeypatch.setattr(products, 'NARROWEST', 1)
  monkeypatch.setattr(products, 'FEW', 1)


def operands(rows=ROWS):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(rows, K)), jnp.float32), jnp.asarray(rng.normal(size=(K, N)), jnp.float32)


def in_loop_body(function):
  """Traced anew for each test: what is chosen while tracing isn't part of jit's key."""

  def call(*args):
    with products.loop_body():
      return function(*args)

  return call


def lowered(function, *args):
  return jax.jit(function).lower(*args).as_text()


def test_by_columns_is_the_product():
  x_BK, kernel_KN = operands()
  np.testing.assert_allclose(products.by_columns(x_BK, products.turned(kernel_KN)), x_BK @ kernel_KN, rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(jax.jit(in_loop_body(products.dense))(x_BK, kernel_KN), x_BK @ kernel_KN, rtol=1e-5, atol=1e-4)


def test_it_is_taken_on_cpu_for_few_rows_and_large_kernels_within_loops():
  dense = in_loop_body(products.dense)

  def is_turned(function, rows, kernel):
    return 'optimization_barrier' in lowered(function, jnp.zeros((rows, len(kernel))), kernel)

  _, kernel_KN = operands()
  assert is_turned(dense, ROWS, kernel_KN)
  assert not is_turned(products.dense, ROWS, kernel_KN)  # no loop
  assert not is_turned(dense, 1, kernel_KN)
  assert is_turned(dense, K // products.FEW, kernel_KN)
  assert not is_turned(dense, K // products.FEW + 1, kernel_KN)
  assert not is_turned(dense, ROWS, kernel_KN[: products.NARROWEST - 1])
  with backend.target('gpu'):
    assert not is_turned(lambda *args: dense(*args), ROWS, kernel_KN)


def test_a_kernel_is_written_out_before_the_loop():
  """XLA's part of the bargain: within it, each turn would take several times as long as by the plain product."""

  def run(x_BK, kernel_KN):
    def turn(_, x_BK):
      with products.loop_body():
        return jnp.tanh(products.dense(x_BK, kernel_KN))[:, :K]

    return jax.lax.fori_loop(0, 10, turn, x_BK)

  text = jax.jit(run).lower(*operands()).compile().as_text()
  (body,) = re.findall(r'while\(.*body=%([\w.]+)', text)
  inside = text[text.index(f'%{body} (') :].split('\n}')[0]
  assert f'f32[{N},{K}]' in inside  # the loop has it
  assert not re.findall(rf'= f32\[(?:{N},{K}|{K},{N})\]\S* (?!get-tuple-element|parameter)\w+', inside)  # and doesn't make it
  assert re.findall(rf'= f32\[{N},{K}\]\S* (?:copy|transpose|fusion)', text)


CONFIGS = {
  'tied': transformer.TransformerConfig(dim=16, num_layers=2, num_heads=4, tied_embedding=True, bias=True, compute_dtype='float32'),
  'untied': transformer.TransformerConfig(dim=16, num_layers=1, num_heads=4, activation='swiglu', compute_dtype='float32'),
  'lstm': lstm.LSTMConfig(dim=12, num_layers=2, compute_dtype='float32'),
  'lstm_untied': lstm.LSTMConfig(dim=12, num_layers=1, tied_embedding=False, compute_dtype='float32'),
}


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_a_step_of_a_model_within_a_loop_is_the_step(config, random_params, any_size):
  model = build.build(config, VOCAB, 8)
  params = random_params(model)

  def steps(params):
    cache, logits = model.init_cache(3, 8), []
    for tokens_BT in np.random.default_rng(0).integers(0, VOCAB, (4, 3, 1)):
      hidden_BTD, cache = model.apply({'params': params}, tokens_BT, cache)
      logits.append(model.apply({'params': params}, hidden_BTD, method='unembed'))
    return jnp.stack(logits), cache

  assert 'optimization_barrier' in lowered(in_loop_body(steps), params)
  found, expected = jax.jit(in_loop_body(steps))(params), jax.jit(steps)(params)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found, expected)
