"""Products of few rows on CPU, with a kernel that is transposed once for all turns of a loop; and of what is rounded to bfloat16."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from textgen_jax import backend
from textgen_jax.models import base, build, lstm, products, transformer

ROWS, D, F = 4, 320, 512
TURNS = products.MIN_TURNS
VOCAB = 29


def rows_and_kernel(rows=ROWS):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(rows, D)), jnp.float32), jnp.asarray(rng.normal(size=(D, F)), jnp.float32)


def within(turns, function):
  """Traced anew each time: what is chosen while tracing isn't part of jit's key."""

  def call(*args):
    with products.loop_body(turns):
      return function(*args)

  return call


def is_by_columns(function, *args):
  return 'optimization_barrier' in jax.jit(function).lower(*args).as_text()


def test_by_columns_is_the_product():
  x_ND, kernel_DF = rows_and_kernel()
  for found in (jax.jit(within(TURNS, products.dense))(x_ND, kernel_DF), jax.jit(products.dense_transposed)(x_ND, kernel_DF.T)):
    np.testing.assert_allclose(found, x_ND @ kernel_DF, rtol=1e-5, atol=1e-4)


def test_its_gradients_are_the_product_s():
  def slopes(multiply):
    return jax.jit(jax.grad(lambda *args: jnp.sin(multiply(*args)).sum(), argnums=(0, 1)))(*args)

  x_ND, kernel_DF = args = rows_and_kernel()
  args = x_ND, kernel_DF.T
  found, expected = slopes(lambda *args: products.dense_transposed(*args)), slopes(lambda x_ND, kernel_FD: x_ND @ kernel_FD.T)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-3), found, expected)


def test_it_is_taken_on_cpu_for_few_rows_and_large_kernels():
  def found(rows, kernel_DF, turns=TURNS):
    x_ND = jnp.zeros((rows, len(kernel_DF)))
    stored = is_by_columns(lambda x_ND: products.dense_transposed(x_ND, kernel_DF.T), x_ND)
    return is_by_columns(within(turns, products.dense), x_ND, kernel_DF), stored

  _, kernel_DF = rows_and_kernel()
  most = D // products.SIDE_PER_ROW
  assert found(ROWS, kernel_DF) == found(most, kernel_DF) == (True, True)
  assert found(ROWS, kernel_DF, turns=TURNS - 1) == (False, True)  # only the one has something to transpose
  assert found(1, kernel_DF) == found(most + 1, kernel_DF) == found(ROWS, kernel_DF[: products.MIN_SIDE - 1]) == (False, False)
  with backend.target('gpu'):
    assert found(ROWS, kernel_DF) == (False, False)


def test_a_kernel_is_transposed_before_the_loop():
  """XLA's part of the bargain: within it, each turn would take several times as long as by the plain product."""
  model = build.build(lstm.LSTMConfig(dim=D, num_layers=1, tied_embedding=False, compute_dtype='float32'), VOCAB, 8)
  params = jax.eval_shape(lambda: base.init_params(model, jax.random.key(0)))

  def run(params, token_B):
    def turn(_, carry):
      logits_BV, cache = base.step_in_loop(model, params, *carry, TURNS)
      return logits_BV.argmax(-1).astype(jnp.int32), cache

    return jax.lax.fori_loop(0, TURNS, turn, (token_B, model.init_cache(ROWS, 0)))

  text = jax.jit(run).lower(params, jnp.zeros(ROWS, jnp.int32)).compile().as_text()
  (body,) = re.findall(r'while\(.*body=%([\w.]+)', text)
  inside = text[text.index(f'%{body} (') :].split('\n}')[0]
  assert f'f32[{4 * D},{D}]' in inside  # the loop has it
  assert not re.findall(rf'= f32\[(?:{4 * D},{D}|{D},{4 * D})\]\S* (?!get-tuple-element|parameter)\w+', inside)  # and doesn't make it


CONFIGS = {
  'tied': transformer.TransformerConfig(dim=16, num_layers=2, num_heads=4, tied_embedding=True, bias=True, compute_dtype='float32'),
  'untied': transformer.TransformerConfig(dim=16, num_layers=1, num_heads=4, activation='swiglu', compute_dtype='bfloat16'),
  'lstm': lstm.LSTMConfig(dim=12, num_layers=2, compute_dtype='float32'),
  'lstm_untied': lstm.LSTMConfig(dim=12, num_layers=1, tied_embedding=False, compute_dtype='bfloat16'),
}


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_a_step_of_a_model_within_a_loop_is_the_step(config, random_params, monkeypatch):
  model = build.build(config, VOCAB, 8)
  params = random_params(model)

  def steps(params, turns):
    cache, logits = model.init_cache(3, 8), []
    for token_B in np.random.default_rng(0).integers(0, VOCAB, (4, 3)):
      logits_BV, cache = base.step_in_loop(model, params, token_B, cache, turns)
      logits.append(logits_BV)
    return jnp.stack(logits), cache

  expected = jax.jit(lambda params: steps(params, 1))(params)
  assert not is_by_columns(lambda params: steps(params, 1), params)
  monkeypatch.setattr(products, 'MIN_SIDE', 1)
  monkeypatch.setattr(products, 'SIDE_PER_ROW', 1)
  found = jax.jit(lambda params: steps(params, TURNS))(params)
  assert is_by_columns(lambda params: steps(params, TURNS), params)
  tolerance = 1e-5 if config.compute_dtype == 'float32' else 0.05

  def assert_close(x, y):
    x, y = (np.asarray(z, np.float32) for z in (x, y))
    assert (np.isfinite(x) == np.isfinite(y)).all()
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * np.abs(y[np.isfinite(y)]).max())

  jax.tree.map(assert_close, found, expected)


def within_operands(dtype, function):
  def call(*args):
    with products.operands(dtype):
      return function(*args)

  return call


def rounded(x):
  return np.asarray(x.astype(jnp.bfloat16), np.float64)


@pytest.mark.parametrize('transposed', [False, True])
@pytest.mark.parametrize('rows', [1, 7, 100])
def test_operands_are_rounded_and_sums_are_not(rows, transposed):
  x_ND, kernel_DF = rows_and_kernel(rows)
  dy_NF = jnp.asarray(np.random.default_rng(1).normal(size=(rows, F)), jnp.float32)
  kernel = kernel_DF.T if transposed else kernel_DF
  multiply = within_operands('bfloat16', products.dense_transposed if transposed else products.dense)
  y_NF, pull = jax.jit(lambda *args: jax.vjp(multiply, *args))(x_ND, kernel)
  dx_ND, dkernel = pull(dy_NF)
  expected = rounded(x_ND) @ rounded(kernel_DF), rounded(dy_NF) @ rounded(kernel_DF).T, rounded(x_ND).T @ rounded(dy_NF)
  for found, correct in zip((y_NF, dx_ND, dkernel.T if transposed else dkernel), expected, strict=True):
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, correct, rtol=1e-5, atol=1e-5 * np.abs(correct).max())


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('devices', [1, 2])
def test_rows_behind_times_are_multiplied_as_rows(devices, dtype):
  rng = np.random.default_rng(0)
  x_TBD, kernel_DF, dy_TBF = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((5, 3, D), (D, F), (5, 3, F)))
  with backend.target('cpu', devices):
    multiply = within_operands(dtype, products.dense_time_major)
    y_TBF, pull = jax.jit(lambda *args: jax.vjp(multiply, *args))(x_TBD, kernel_DF)
    gradient = jax.jit(within_operands(dtype, products.kernel_gradient))(x_TBD, dy_TBF)
    text = jax.jit(multiply).lower(x_TBD, kernel_DF).as_text()
  # Over several devices nothing is flattened.
  assert (f'tensor<15x{D}x' in text) == (devices == 1)
  x, kernel, dy = (rounded(z) if dtype == 'bfloat16' else np.asarray(z, np.float64) for z in (x_TBD, kernel_DF, dy_TBF))
  slope = np.einsum('TBD,TBF->DF', x, dy)
  for found, correct in zip((y_TBF, *pull(dy_TBF), gradient), (x @ kernel, dy @ kernel.T, slope, slope), strict=True):
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, correct, rtol=1e-5, atol=1e-5 * np.abs(correct).max())


def test_one_time_of_few_rows_is_by_columns_on_any_number_of_devices():
  x_TBD, kernel_DF = jnp.zeros((1, ROWS, D)), jnp.zeros((D, F))
  for devices in (1, 2):
    with backend.target('cpu', devices):
      assert is_by_columns(within(TURNS, products.dense_time_major), x_TBD, kernel_DF)


def test_a_gradient_over_all_times_is_summed_in_float32():
  """Where what is multiplied is bfloat16 already, too: each device's part of the sum isn't rounded before they are added up."""
  with backend.target('cpu', 2):
    args = jnp.zeros((4, 2, 8), jnp.bfloat16), jnp.zeros((4, 2, 8), jnp.bfloat16)
    text = jax.jit(products.kernel_gradient).lower(*args).as_text()
  (line,) = [line for line in text.splitlines() if 'dot_general' in line]
  assert line.endswith('-> tensor<8x8xf32>')


def test_operands_stay_as_they_are_unless_told():
  x_ND, kernel_DF = rows_and_kernel()
  found = jax.jit(within_operands('float32', products.dense))(x_ND, kernel_DF)
  np.testing.assert_array_equal(found, jax.jit(products.dense)(x_ND, kernel_DF))
  args = x_ND.astype(jnp.bfloat16), kernel_DF.astype(jnp.bfloat16)
  found = jax.jit(within_operands('bfloat16', products.dense))(*args)
  assert found.dtype == jnp.bfloat16  # what computes in bfloat16 has results of it
  np.testing.assert_array_equal(found, jax.jit(jnp.matmul)(*args))


@pytest.mark.parametrize('transposed', [False, True])
def test_stacks_are_rounded_alike(transposed):
  """As where seeds train together, or the rows of a large vocabulary's logits are grouped."""
  multiply = within_operands('bfloat16', products.dense_transposed if transposed else products.dense)
  slopes = jax.grad(lambda *args: jnp.sin(multiply(*args)).sum(), argnums=(0, 1))
  rng = np.random.default_rng(0)
  args = tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 7, D), (3, D, D)))
  found = jax.jit(jax.vmap(slopes))(*args)
  for n in range(3):
    for x, y in zip(found, jax.jit(slopes)(*(x[n] for x in args)), strict=True):
      np.testing.assert_allclose(x[n], y, rtol=1e-2, atol=1e-2 * np.abs(y).max())


@pytest.mark.parametrize(('rows', 'by_columns'), [(ROWS, True), (D, False)])
def test_a_recurrence_rounds_its_operands(rows, by_columns):
  """Both products of each time, and the one over all times."""
  assert products.is_faster_by_columns(rows, jnp.zeros((D, 4 * D))) == by_columns
  layer = lstm.LSTMLayer(lstm.LSTMConfig(dim=D, num_layers=1), 'float32')
  x_TBD = jax.random.normal(jax.random.key(0), (TURNS, rows, D))
  carry = (jnp.zeros((rows, D)),) * 2
  params = nn.unbox(layer.init(jax.random.key(1), x_TBD, carry, None, None, True))

  def slopes(dtype):
    loss = within_operands(dtype, lambda *args: jnp.sin(layer.apply(args[0], args[1], carry, None, None, True)[0]).sum())
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x_TBD)
    return lowered.compile()(params, x_TBD), lowered.as_text()

  (found, text), (expected, _) = slopes('bfloat16'), slopes('float32')
  assert not [line for line in text.splitlines() if 'dot_general' in line and 'bf16' not in line]
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert x.dtype == jnp.float32
    assert 0 < np.linalg.norm(x - y) < 0.02 * np.linalg.norm(y)


@pytest.mark.parametrize(('told', 'multiplies'), [('avx512_bf16', True), ('amx_bf16', True), ('avx512f', False), ('', False)])
def test_a_cpu_s_flags_tell_whether_it_multiplies_bfloat16(monkeypatch, tmp_path, told, multiplies):
  path = tmp_path / f'cpuinfo{told}'
  path.write_text(f'processor\t: 0\nflags\t\t: fpu sse2 {told} avx2\n')
  assert backend.cpu_multiplies_bfloat16(str(path)) == multiplies
  assert not backend.cpu_multiplies_bfloat16(str(tmp_path / 'none'))
  monkeypatch.setattr(backend, 'cpu_multiplies_bfloat16', lambda: multiplies)
  assert products.operand_dtype('auto', 'cpu') == ('bfloat16' if multiplies else 'float32')
  assert products.operand_dtype('float32', 'cpu') == products.operand_dtype('auto', 'gpu') == 'float32'
  assert products.operand_dtype('bfloat16', 'tpu') == 'bfloat16'
