import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from textgen_jax.training import losses


def test_hand_numbers():
  # softmax of ln 1, ln 2, ln 5 is 1/8, 2/8, 5/8; of equal logits a third each.
  logits_BTV = jnp.log(jnp.array([[[1.0, 2.0, 5.0], [7.0, 7.0, 7.0]], [[1.0, 2.0, 5.0], [3.0, 1.0, 4.0]]]))
  nll_BT = losses.nll(logits_BTV, np.array([[2, 0], [0, 1]]))
  np.testing.assert_allclose(nll_BT, np.log([[8 / 5, 3.0], [8.0, 8.0]]), rtol=1e-6)


def test_padded_vocabulary_takes_no_mass_and_gives_no_nan():
  free_BTV = jnp.array([[[0.0, 1.0, 2.0], [3.0, -1.0, 0.5]], [[1.0, 1.0, 1.0], [-40.0, 80.0, 0.0]]])
  padded_BTV = jnp.pad(free_BTV, ((0, 0), (0, 0), (0, 2)), constant_values=-jnp.inf)
  targets_BT = np.array([[1, 0], [2, 1]])

  def total(logits_BTV):
    return losses.nll(logits_BTV, targets_BT).sum()

  np.testing.assert_array_equal(losses.nll(padded_BTV, targets_BT), losses.nll(free_BTV, targets_BT))
  gradient = jax.grad(total)(padded_BTV)
  np.testing.assert_allclose(gradient[..., :3], jax.nn.softmax(free_BTV) - jax.nn.one_hot(targets_BT, 3), atol=1e-6)
  np.testing.assert_array_equal(gradient[..., 3:], 0)


def test_large_logits_do_not_overflow():
  logits_BTV = jnp.array([[[1e4, 0.0], [-1e4, 0.0]]])
  np.testing.assert_allclose(losses.nll(logits_BTV, np.array([[1, 0]])), [[1e4, 1e4]])


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_agrees_with_optax_and_is_float32(dtype):
  rng = np.random.default_rng(0)
  logits_BTV = jnp.asarray(5 * rng.standard_normal((3, 7, 40)), dtype)
  targets_BT = rng.integers(0, 40, (3, 7))
  nll_BT = losses.nll(logits_BTV, targets_BT)
  assert nll_BT.dtype == jnp.float32
  expected = optax.softmax_cross_entropy_with_integer_labels(logits_BTV.astype(jnp.float32), targets_BT)
  np.testing.assert_allclose(nll_BT, expected, rtol=1e-5, atol=1e-6)


def test_entropy_by_hand():
  no = -np.inf
  logits_BTV = np.array([[[0, 0, 0, 0], [0, no, 0, no]], [[1e4, 0, 0, 0], [np.log(3), 0, no, no]]])
  uneven = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
  np.testing.assert_allclose(losses.entropy(jnp.asarray(logits_BTV)), [[np.log(4), np.log(2)], [0, uneven]], atol=1e-6)


def few_logits_at_once(monkeypatch, rows, tokens, vocab_size):
  """So many tokens of a row, times so many rows, are a chunk."""
  monkeypatch.setattr(losses, 'MOST_LOGITS_BYTES_ON_CPU', 4 * rows * tokens * vocab_size)


def draw(rows, time, dim=5, vocab_size=14, seed=0):
  """Parameters of an output layer whose last ids only pad it, hidden states, targets, weights with zeros among them."""
  rng = np.random.default_rng(seed)
  params = {'kernel': rng.standard_normal((dim, vocab_size)), 'bias': rng.standard_normal(vocab_size)}
  weights_BT = rng.choice([0.0, 0.25, 1.0], (rows, time))
  weights_BT[-1] = 0
  arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, rng.standard_normal((rows, time, dim)), weights_BT))
  return *arrays, rng.integers(0, vocab_size - 3, (rows, time)).astype(np.int32)


def unembed_with(params):
  def unembed(hidden_BTD):
    logits_BTV = hidden_BTD @ params['kernel'] + params['bias']
    return jnp.where(jnp.arange(logits_BTV.shape[-1]) < logits_BTV.shape[-1] - 3, logits_BTV, -jnp.inf)

  return unembed


@pytest.mark.parametrize(('rows', 'time', 'row_ways', 'tokens', 'chunks'), [(3, 7, 1, 2, 4), (4, 7, 2, 3, 3), (6, 5, 3, 0.4, 5)])
def test_chunks_change_neither_losses_nor_gradients(rows, time, row_ways, tokens, chunks, monkeypatch):
  """Also of what is made of each target's loss, and of the weights."""
  params, hidden_BTD, weights_BT, targets_BT = draw(rows, time)

  def chunked(params, hidden_BTD, weights_BT):
    loss, nll_BT = losses.weighted_nll(unembed_with(params), hidden_BTD, targets_BT, weights_BT, row_ways)
    return 3 * loss, jnp.sin(nll_BT).sum(), nll_BT

  def plain(params, hidden_BTD, weights_BT):
    log_p_BTV = jax.nn.log_softmax(unembed_with(params)(hidden_BTD)[..., :-3])
    nll_BT = -(log_p_BTV * jax.nn.one_hot(targets_BT, log_p_BTV.shape[-1])).sum(axis=-1)
    return 3 * (nll_BT * weights_BT).sum(), jnp.sin(nll_BT).sum(), nll_BT

  few_logits_at_once(monkeypatch, rows // row_ways, tokens, 14)
  assert losses.num_chunks(unembed_with(params), hidden_BTD, row_ways) == chunks

  def found(function):
    def value(terms, *args):
      return jnp.dot(terms, jnp.stack(function(*args)[:2])), function(*args)

    grad = jax.jit(jax.grad(value, argnums=(1, 2, 3), has_aux=True))
    return [grad(jnp.asarray(terms, jnp.float32), params, hidden_BTD, weights_BT) for terms in ([1, 0], [0, 1], [1, 1])]

  for one, expected in zip(found(chunked), found(plain), strict=True):
    assert any(np.abs(x).max() > 0.1 for x in jax.tree.leaves(expected[0]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), one, expected)


def test_a_loss_that_is_not_finite_stays_so_in_chunks(monkeypatch):
  params, hidden_BTD, weights_BT, targets_BT = draw(3, 7)
  few_logits_at_once(monkeypatch, 3, 2, 14)
  weigh = jax.jit(lambda hidden_BTD: losses.weighted_nll(unembed_with(params), hidden_BTD, targets_BT, weights_BT))
  for broken in (jnp.nan, jnp.inf):
    hidden_BTD = hidden_BTD.at[1, 4, 2].set(broken)
    loss, nll_BT = weigh(hidden_BTD)
    assert not np.isfinite(loss)
    np.testing.assert_array_equal(np.isfinite(nll_BT), np.arange(21).reshape(3, 7) != 11)


def test_tokens_are_measured_in_chunks(monkeypatch):
  params, hidden_BTD, _, targets_BT = draw(3, 7)

  def both(logits_BTV, targets_BT):
    return jnp.stack([losses.nll(logits_BTV, targets_BT), losses.entropy(logits_BTV)], axis=-1)

  expected = both(unembed_with(params)(hidden_BTD), targets_BT)
  few_logits_at_once(monkeypatch, 3, 2, 14)
  np.testing.assert_allclose(losses.measure(both, unembed_with(params), hidden_BTD, targets_BT), expected, rtol=1e-5, atol=1e-6)


def test_all_logits_are_never_there_at_once(monkeypatch):
  params, hidden_BTD, weights_BT, targets_BT = draw(4, 64, dim=8, vocab_size=4096)
  whole = 4 * 4 * 64 * 4096

  def temporaries(function):
    return jax.jit(function).lower(params, hidden_BTD).compile().memory_analysis().temp_size_in_bytes

  def loss(params, hidden_BTD):
    return losses.weighted_nll(unembed_with(params), hidden_BTD, targets_BT, weights_BT)[0]

  def learn(params, hidden_BTD):
    return jax.grad(loss, (0, 1))(params, hidden_BTD)

  def score(params, hidden_BTD):
    return losses.measure(losses.nll, unembed_with(params), hidden_BTD, targets_BT)

  assert min(temporaries(learn), temporaries(score)) >= whole
  few_logits_at_once(monkeypatch, 4, 2, 4096)
  jax.clear_caches()
  assert max(temporaries(learn), temporaries(score)) < whole / 4
