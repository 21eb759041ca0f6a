import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from textgen_jax import trees
from textgen_jax.models import build, transformer

# Compiles in a quarter of the time; nothing here runs for long.
quick_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
TINY = transformer.TransformerConfig(dim=16, num_layers=2, num_heads=4, compute_dtype='float32')


def init(model):
  make = quick_jit(lambda key: nn.unbox(model.init(key, jnp.zeros((1, 2), jnp.int32), method='init_everything'))['params'])
  return make(jax.random.PRNGKey(0))


class Seen:
  """What `locate` must work out, a token at a time."""

  def __init__(self, slots):
    self.slots = [None] * slots  # index of the token in each slot
    self.cursor, self.count, self.document = 0, 0, 0

  def read(self, valid_T, starts_T, window):
    positions, indices, documents = [], [], []
    for valid, start in zip(valid_T, starts_T, strict=True):
      if valid and start:
        self.document = self.count
      positions.append(self.count - self.document)
      indices.append(self.count if valid else None)
      documents.append(self.document)
      self.slots[self.cursor % len(self.slots)] = indices[-1]
      self.cursor, self.count = self.cursor + 1, self.count + bool(valid)
    seen_TS = [
      [index is not None and slot is not None and max(document, index - window + 1) <= slot <= index for slot in self.slots]
      for index, document in zip(indices, documents, strict=True)
    ]
    return np.array(positions), np.array(seen_TS)


@pytest.mark.parametrize('cached', [False, True])
@pytest.mark.parametrize('masked', [False, True])
def test_locate_against_a_walk_over_the_tokens(cached, masked):
  rng = np.random.default_rng(0)
  batch, window = 3, 4
  model, locate = build.build(TINY, 11, window), quick_jit(transformer.locate, static_argnums=4)
  for slots in (6, 30):  # a ring of window + chunk - 1, or room for all
    cache = model.init_cache(batch, slots) if cached else None
    walks = [Seen(slots) for _ in range(batch)]
    for time in (3, 1, 3, 2, 3) if cached else (9,):
      valid_BT = rng.random((batch, time)) < 0.6 if masked else np.ones((batch, time), bool)
      starts_BT = rng.random((batch, time)) < 0.2 if masked else np.zeros((batch, time), bool)
      given = (valid_BT, starts_BT) if masked else (None, None)
      if not cached:
        walks = [Seen(time) for _ in range(batch)]
      frame, cache = locate(np.zeros((batch, time), np.int32), cache, *given, window)
      for b, walk in enumerate(walks):
        position_T, seen_TS = walk.read(valid_BT[b], starts_BT[b], window)
        valid_T = valid_BT[b]
        np.testing.assert_array_equal(np.broadcast_to(frame.position_BT, (batch, time))[b, valid_T], position_T[valid_T])
        mask_TS = np.broadcast_to(frame.mask_BTS, (batch, *seen_TS.shape))[b]
        np.testing.assert_array_equal(mask_TS[valid_T], seen_TS[valid_T])


def test_one_layer_sees_exactly_a_sliding_window(random_params):
  """By gradient: output t depends on inputs t - 3 to t."""
  model = build.build(dataclasses.replace(TINY, num_layers=1), 30, 4)
  params = random_params(model)
  tokens_BT = np.random.default_rng(0).permutation(24).reshape(2, 12)

  def outputs(table_VD):
    return model.apply({'params': {**params, 'embed': {'embedding': table_VD}}}, tokens_BT)[0] @ np.arange(16.0)

  slope = quick_jit(jax.jacrev(outputs))(params['embed']['embedding'])
  touched = np.abs(slope).max(axis=-1)[:, :, tokens_BT] > 0
  distance = np.arange(12)[:, None] - np.arange(12)
  for b in range(2):
    np.testing.assert_array_equal(touched[b, :, b], (distance >= 0) & (distance < 4))


@pytest.mark.parametrize(
  ('activation', 'expected'), [('gelu', [-0.0454, 0.0, 1.9546]), ('relu2', [0.0, 0.0, 4.0]), ('swiglu', [0.4768, 0.0, 3.5232])]
)
def test_activations_by_hand(activation, expected):
  config = transformer.TransformerConfig(dim=3, hidden_dim=3, activation=activation)
  mlp = transformer.MLP(config, 'float32', nn.initializers.zeros, nn.initializers.zeros)
  eye = {'kernel': np.eye(3, dtype=np.float32)}
  params = {'up': eye, 'down': eye} | ({'gate': eye} if activation == 'swiglu' else {})
  actual = mlp.apply({'params': params}, np.array([[[-2, 0, 2]], [[2, 0, -2]]], np.float32))
  np.testing.assert_allclose(actual, [[expected], [expected[::-1]]], atol=1e-4)


def test_gpt2_init_follows_the_paper():
  config = transformer.TransformerConfig(
    dim=64, num_layers=3, position='learned', norm='layer', activation='gelu', bias=True, qk_norm=False, init='gpt2'
  )
  leaves = dict(trees.named_leaves(init(build.build(config, 300, 100))))
  assert any(name.endswith('bias') for name in leaves)
  for name, leaf in leaves.items():
    if name.endswith(('bias', 'scale')):
      np.testing.assert_array_equal(leaf, name.endswith('scale'))
      continue
    std = 0.02 / 6**0.5 if name.endswith(('output/kernel', 'down/kernel')) else 0.02
    np.testing.assert_allclose([np.std(leaf), np.mean(leaf) + std], std, rtol=0.07, err_msg=name)  # at least 4,096 numbers: 5 sigma


def test_zero_residual_blocks_begin_as_the_identity():
  model = build.build(dataclasses.replace(TINY, dim=64, bias=True), 50, 16)
  params = init(model)
  tokens_BT = np.random.default_rng(0).integers(50, size=(2, 7))
  x_BTD = np.asarray(params['embed']['embedding'])[tokens_BT]
  hidden_BTD, _ = quick_jit(lambda params: model.apply({'params': params}, tokens_BT))(params)
  np.testing.assert_allclose(hidden_BTD, x_BTD / np.sqrt(np.square(x_BTD).mean(-1, keepdims=True) + 1e-5), rtol=1e-4, atol=1e-6)
  for name, leaf in trees.named_leaves(params):
    if name.endswith('kernel') and not name.endswith(('output/kernel', 'down/kernel')):
      np.testing.assert_allclose(np.std(leaf), 64**-0.5, rtol=0.07, err_msg=name)
  np.testing.assert_allclose(np.std(params['embed']['embedding']), 0.02, rtol=0.07)
