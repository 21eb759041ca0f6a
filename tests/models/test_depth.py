"""What is kept for the backward pass, and a loop over layers: neither changes a number, a name or what is sown."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from textgen_jax import trees
from textgen_jax.models import attention, attention_kernels, build, depth, transformer

# Compiles in a quarter of the time; nothing here runs for long.
quick_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
CONFIG = transformer.TransformerConfig(dim=16, num_layers=2, num_heads=4, num_kv_heads=2, compute_dtype='float32')
B, T, VOCAB = 2, 10, 11
TOKENS_BT = np.random.default_rng(0).integers(VOCAB, size=(B, T), dtype=np.int32)
SCANNED = {'scan_layers': True}


class Telling(attention.Attention):
  """Sows how widely each query looks, a loss, and what is drawn at random where anything is."""

  def collect(self, p_BHTS, v_BGSK, deterministic):
    entropy_BHT = -jax.scipy.special.xlogy(p_BHTS, p_BHTS).sum(-1)
    self.sow('intermediates', 'entropy_BHT', entropy_BHT)
    self.sow('losses', 'narrowness', -entropy_BHT.mean(1))
    if not deterministic:
      self.sow('intermediates', 'drawn', jax.random.bits(self.make_rng('dropout')))
    return super().collect(p_BHTS, v_BGSK, deterministic)


def telling(**changes):
  return transformer.Transformer(dataclasses.replace(CONFIG, **changes), VOCAB, T, Telling)


def loss_and_gradient(params, *masks, key=None, **changes):
  model = build.build(dataclasses.replace(CONFIG, **changes), VOCAB, T)

  def loss(params, key):
    how = {} if key is None else {'deterministic': False, 'rngs': {'dropout': key}}
    hidden_BTD = model.apply({'params': params}, TOKENS_BT, None, *masks, **how)[0]
    return jnp.square(model.apply({'params': params}, hidden_BTD, method='unembed')).mean()

  return quick_jit(jax.value_and_grad(loss))(params, key)


def assert_equal(actual, expected):
  for (name, x), (_, y) in zip(trees.named_leaves(actual), trees.named_leaves(expected), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6 * np.abs(y).max(), err_msg=name)


@pytest.fixture(scope='module')
def params(random_params):
  return random_params(build.build(CONFIG, VOCAB, T))


@pytest.fixture(scope='module')
def expected(params):
  return loss_and_gradient(params)


@pytest.mark.parametrize('scan_layers', [False, True])
@pytest.mark.parametrize('remat', depth.REMAT)
def test_loss_and_gradient_are_the_same_in_every_way(remat, scan_layers, params, expected):
  if (remat, scan_layers) != ('none', False):
    assert_equal(loss_and_gradient(params, remat=remat, scan_layers=scan_layers), expected)


def test_a_kernel_that_is_a_loop_itself_works_in_the_loop(params, monkeypatch):
  """On rows of several documents. causal is in the test above, plain in `test_contract`."""
  monkeypatch.setattr(attention_kernels, 'LARGEST_BLOCK', 4)
  given = params, None, np.random.default_rng(1).random((B, T)) < 0.3
  expected = loss_and_gradient(*given, attention_kernel='blocks')
  assert_equal(loss_and_gradient(*given, attention_kernel='blocks', remat='full', **SCANNED), expected)


@pytest.mark.parametrize(('remat', 'scan_layers'), [('dots', False), ('full', True)])
def test_what_is_computed_again_is_dropped_alike(remat, scan_layers, params):
  how = {'dropout': 0.3, 'key': jax.random.PRNGKey(0), 'scan_layers': scan_layers}
  assert_equal(loss_and_gradient(params, remat=remat, **how), loss_and_gradient(params, **how))


def test_layers_draw_by_key_each_for_itself(params):
  @quick_jit
  def apply(key):
    how = {'deterministic': False, 'rngs': {'dropout': key}, 'mutable': ['intermediates']}
    return telling(dropout=0.3, **SCANNED).apply({'params': params}, TOKENS_BT, **how)[1]

  def drawn(seed):
    sown = apply(jax.random.key(seed, impl='rbg'))
    return [int(x) for name, x in trees.named_leaves(sown) if 'drawn' in name]

  first = drawn(0)
  assert len(set(first)) == len(first) == CONFIG.num_layers
  assert drawn(0) == first
  assert not set(drawn(1)) & set(first)


@pytest.mark.parametrize('scan_layers', [False, True])
def test_kept_are_products_then_inputs_alone(scan_layers, params):
  def kept(remat):
    model = build.build(dataclasses.replace(CONFIG, remat=remat, scan_layers=scan_layers), VOCAB, T)
    residuals = jax.eval_shape(lambda params: jax.vjp(lambda params: model.apply({'params': params}, TOKENS_BT)[0], params)[1], params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))

  assert kept('none') > 2 * kept('dots')
  # Of a token in a layer: queries, keys, values, attention's output and the MLP's hidden units; no one asks for the last product.
  assert kept('dots') - kept('full') == CONFIG.num_layers * B * T * (16 + 2 * 8 + 16 + 64) * 4


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_what_blocks_sow_is_theirs(remat, params):
  def sown(**changes):
    def apply(params):
      model = telling(**changes)
      _, named = model.apply({'params': params}, TOKENS_BT, mutable=['intermediates', 'losses'])
      return named, model.apply({'params': params}, TOKENS_BT, capture_intermediates=True)[1]

    return quick_jit(apply)(params)

  expected, actual = sown(), sown(remat=remat, **SCANNED)
  names = [name for name, _ in trees.named_leaves(expected)]
  assert '0/losses/block_1/attention/narrowness/0' in names
  assert '1/intermediates/block_0/mlp/up/__call__/0' in names
  assert [name for name, _ in trees.named_leaves(actual)] == names
  assert_equal(actual, expected)


def test_what_another_call_has_sown_is_not_lost_in_silence(params):
  model = telling(**SCANNED)
  _, sown = model.apply({'params': params}, TOKENS_BT, mutable=['intermediates'])
  with pytest.raises(ValueError, match=r'model\.scan_layers=True stacks parameters alone.* of the kinds intermediates'):
    model.apply({'params': params, **sown}, TOKENS_BT, mutable=['intermediates'])


def test_the_same_program_makes_the_same_parameters():
  def made(**changes):
    model = build.build(dataclasses.replace(CONFIG, **changes), VOCAB, T)
    program, shapes = jax.make_jaxpr(model.init, return_shape=True)(jax.random.PRNGKey(0), TOKENS_BT)
    return str(program), jax.tree.structure(shapes), jax.tree.leaves(shapes)  # names of axes are in the structure

  assert made(**SCANNED) == made()


def test_the_loop_s_program_hardly_grows_with_the_layers():
  def length(num_layers, **changes):
    model = build.build(dataclasses.replace(CONFIG, num_layers=num_layers, **changes), VOCAB, T)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.PRNGKey(0), TOKENS_BT))
    gradient = jax.grad(lambda variables: jnp.square(model.apply(variables, TOKENS_BT)[0]).sum())
    return len(jax.jit(gradient).lower(shapes).as_text())

  in_loop = length(12, **SCANNED)
  assert in_loop < 1.4 * length(3, **SCANNED)
  assert in_loop < length(4)
