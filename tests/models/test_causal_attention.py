import jax
import jax.numpy as jnp
import numpy as np
import pytest

from textgen_jax.models import causal_attention


def plain(q_BTHK, k_BGSK, v_BGSK):
  """All scores at once, keys repeated for each head."""
  shared, time = q_BTHK.shape[2] // k_BGSK.shape[1], q_BTHK.shape[1]
  k_BHSK, v_BHSK = (jnp.repeat(x, shared, axis=1) for x in (k_BGSK, v_BGSK))
  s_BHTS = jnp.einsum('BTHK,BHSK->BHTS', q_BTHK, k_BHSK) / q_BTHK.shape[-1] ** 0.5
  p_BHTS = jax.nn.softmax(jnp.where(np.tril(np.ones((time, time), bool)), s_BHTS, -jnp.inf), axis=-1)
  return jnp.einsum('BHTS,BHSK->BTHK', p_BHTS, v_BHSK)


def draw(seed, time, heads, groups, width=4, scale=1.0):
  rng = np.random.default_rng(seed)
  shapes = (2, time, heads, width), (2, groups, time, width), (2, groups, time, width), (2, time, heads, width)
  return [jnp.asarray(scale * rng.standard_normal(shape), jnp.float32) for shape in shapes]


# One block, less than one, a whole number of them, and a rest.
@pytest.mark.parametrize('time', [1, 5, causal_attention.BLOCK, 2 * causal_attention.BLOCK, 2 * causal_attention.BLOCK + 7])
@pytest.mark.parametrize(('heads', 'groups'), [(2, 2), (4, 2), (3, 1)])
def test_values_and_gradients_are_those_of_all_scores_at_once(time, heads, groups):
  *qkv, dy_BTHK = draw(0, time, heads, groups)
  expected, their_pull = jax.vjp(plain, *qkv)
  found, our_pull = jax.vjp(causal_attention.attend, *qkv)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  for ours, theirs in zip(our_pull(dy_BTHK), their_pull(dy_BTHK), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


def test_large_scores_give_no_overflow():
  *qkv, dy_BTHK = draw(1, 70, 2, 2, scale=30.0)
  found, pull = jax.vjp(causal_attention.attend, *qkv)
  np.testing.assert_allclose(found, plain(*qkv), rtol=1e-3, atol=1e-3)
  assert all(np.isfinite(x).all() for x in pull(dy_BTHK))


def test_nothing_is_seen_of_what_comes_after():
  *qkv, _ = draw(2, 70, 2, 2)
  changed = [qkv[0], *(x.at[:, :, 66].add(5.0) for x in qkv[1:])]
  one, other = causal_attention.attend(*qkv), causal_attention.attend(*changed)
  np.testing.assert_array_equal(one[:, :66], other[:, :66])
  assert np.abs(one[:, 66:] - other[:, 66:]).max() > 0.1
