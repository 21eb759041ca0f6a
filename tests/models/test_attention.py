import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from textgen_jax.models import attention, transformer

CAUSAL = np.tril(np.ones((1, 3, 3), bool))


def make(**changes):
  config = transformer.TransformerConfig(**{'dim': 2, 'num_heads': 1, 'position': 'learned', 'qk_norm': False} | changes)
  return attention.Attention(config, 'float32', nn.initializers.zeros, nn.initializers.zeros)


def kernels(**by_name):
  return {'params': {name: {'kernel': kernel} for name, kernel in by_name.items()}}


def frame(mask_BTS):
  return attention.Frame(np.arange(mask_BTS.shape[1])[None], mask_BTS, None)


def test_three_tokens_by_hand():
  eye = np.eye(2, dtype=np.float32)
  x_BTD = np.array([[[1, 0], [0, 1], [1, 1]], [[0, 2], [0, 2], [2, 0]]], np.float32)
  variables = kernels(query=eye, key=eye, value=eye, output=eye)
  y_BTD, cache = make().apply(variables, x_BTD, frame(CAUSAL), None, True)
  assert cache is None
  a, b = np.exp(1 / 2**0.5), np.exp(2 / 2**0.5)  # scores of 1 and of 2, over the root of the head's width
  c = np.exp(4 / 2**0.5)
  expected = [
    [[1, 0], [1 / (1 + a), a / (1 + a)], [(a + b) / (2 * a + b)] * 2],
    [[0, 2], [0, 2], [2 * c / (2 + c), 4 / (2 + c)]],
  ]
  np.testing.assert_allclose(y_BTD, expected, rtol=1e-6, atol=1e-6)


def test_heads_and_groups_against_loops():
  rng = np.random.default_rng(0)
  heads, groups, width = 4, 2, 3
  shapes = {'query': (12, 12), 'key': (12, 6), 'value': (12, 6), 'output': (12, 12)}
  kernel = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  x_BTD = rng.normal(size=(2, 3, 12)).astype(np.float32)
  y_BTD, _ = make(dim=12, num_heads=heads, num_kv_heads=groups).apply(kernels(**kernel), x_BTD, frame(CAUSAL), None, True)
  for b in range(2):
    q, k, v = (x_BTD[b] @ kernel[name] for name in ('query', 'key', 'value'))
    for t in range(3):
      mixed = []
      for h in range(heads):
        own, shared = slice(width * h, width * h + width), slice(width * (h // 2), width * (h // 2) + width)
        p = np.exp([q[t, own] @ k[s, shared] / width**0.5 for s in range(t + 1)])
        mixed.append(p / p.sum() @ v[: t + 1, shared])
      np.testing.assert_allclose(y_BTD[b, t], np.concatenate(mixed) @ kernel['output'], rtol=1e-4, atol=1e-4)


def test_groups_equal_heads_with_repeated_keys_and_values():
  rng = np.random.default_rng(0)
  kernel = {name: rng.normal(size=(8, size)).astype(np.float32) for name, size in (('query', 8), ('key', 4), ('value', 4), ('output', 8))}
  x_BTD = rng.normal(size=(2, 3, 8)).astype(np.float32)
  changes = {'dim': 8, 'num_heads': 4, 'position': 'rotary'}
  grouped, _ = make(**changes, num_kv_heads=2).apply(kernels(**kernel), x_BTD, frame(CAUSAL), None, True)
  for name in ('key', 'value'):
    kernel[name] = kernel[name].reshape(8, 2, 2).repeat(2, axis=1).reshape(8, 8)
  full, _ = make(**changes).apply(kernels(**kernel), x_BTD, frame(CAUSAL), None, True)
  np.testing.assert_allclose(grouped, full, rtol=1e-5, atol=1e-5)


def test_query_and_key_norm_make_scores_blind_to_length():
  rng = np.random.default_rng(0)
  kernel = {name: rng.normal(size=(8, 8)).astype(np.float32) for name in ('query', 'key', 'value', 'output')}
  x_BTD = rng.normal(size=(2, 3, 8)).astype(np.float32)

  def run(**scaled):
    variables = kernels(**{name: scaled.get(name, 1) * kernel[name] for name in kernel})
    variables['params'] |= {name: {'scale': np.array([1, 0.5, 2, 1], np.float32)} for name in ('query_norm', 'key_norm')}
    return make(dim=8, num_heads=2, qk_norm=True).apply(variables, x_BTD, frame(CAUSAL), None, True)[0]

  np.testing.assert_allclose(run(query=50, key=30), run(), rtol=1e-3, atol=1e-3)
  assert np.abs(run(value=2) - run()).max() > 0.1


def test_a_query_that_may_look_at_nothing_gives_no_nan():
  mask_BTS = CAUSAL.copy()
  mask_BTS[0, 0, 0] = False
  eye = np.eye(2, dtype=np.float32)
  variables = kernels(query=eye, key=eye, value=eye, output=eye)
  y_BTD, _ = make().apply(variables, np.ones((2, 3, 2), np.float32), frame(mask_BTS), None, True)
  assert np.isfinite(y_BTD).all()


@pytest.mark.parametrize(
  ('time', 'cursor', 'slots'), [(1, 2, [2]), (1, 9, [1]), (3, 0, [0, 1, 2]), (3, 3, [3, 0, 1]), (4, 6, [2, 3, 0, 1])]
)
def test_write_slots_goes_round(time, cursor, slots):
  buffer_BS = -np.arange(16, dtype=np.float32).reshape(2, 4, 2)
  new_BT = 1 + np.arange(2 * time * 2, dtype=np.float32).reshape(2, time, 2)
  expected = buffer_BS.copy()
  for t, slot in enumerate(slots):
    expected[:, slot] = new_BT[:, t]
  actual = jax.jit(attention.write_slots)(jnp.asarray(buffer_BS), new_BT, np.int32(cursor))
  np.testing.assert_array_equal(actual, expected)


def test_write_slots_refuses_more_than_there_is():
  with pytest.raises(ValueError, match='5 tokens in one call do not fit a cache of 4 slots'):
    attention.write_slots(jnp.zeros((2, 4)), jnp.zeros((2, 5)), jnp.int32(0))
