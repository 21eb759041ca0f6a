import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from textgen_jax.text import base
from textgen_jax.text import build as text_build
from textgen_jax.training import evaluate

TOKENS = np.random.default_rng(1).integers(0, 11, 38).astype(np.uint8)
ONE_BYTE = np.ones(11, np.int32)


def score(model, params, tokens=TOKENS, byte_lengths=ONE_BYTE, length=5, batch_size=3, **options):
  return evaluate.evaluate(model, params, tokens, byte_lengths, length=length, batch_size=batch_size, **options)


def brute_force(model, params, tokens, row_length):
  """Each token but the first, from the tokens of its row alone, one at a time."""

  @jax.jit
  def log_p_V(prefix_T, last):
    hidden_BTD, _ = model.apply({'params': params}, prefix_T[None])
    return jax.nn.log_softmax(model.apply({'params': params}, hidden_BTD, method='unembed')[0, last])

  nll = []
  for target in range(1, len(tokens)):
    prefix = tokens[(target - 1) // row_length * row_length : target]
    padded_T = np.pad(prefix, (0, row_length - len(prefix))).astype(np.int32)  # zeros for all that a causal model mustn't see
    nll.append(-float(log_p_V(padded_T, len(prefix) - 1)[int(tokens[target])]))
  return nll


def test_equals_brute_force(model, make_params):
  params = make_params(model)
  found = score(model, params)
  expected = brute_force(model, params, TOKENS, 5)
  assert found.tokens == len(expected) == 37
  np.testing.assert_allclose(found.nll_sum, sum(expected), rtol=1e-6)
  np.testing.assert_allclose(found.loss_nats, np.mean(expected), rtol=1e-6)


@pytest.mark.parametrize('num_tokens', [38, 37, 13, 12, 3, 2])
def test_carried_rows_equal_brute_force(num_tokens, make_model, make_params):
  model = make_model('lstm')
  params, tokens = make_params(model), TOKENS[:num_tokens]
  found = score(model, params, tokens, length=4, batch_size=2, row_chunks=3)
  np.testing.assert_allclose(found.nll_sum, sum(brute_force(model, params, tokens, 12)), rtol=1e-6)
  assert found.tokens == num_tokens - 1
  if num_tokens > 5:  # the carry matters
    assert found.nll_sum != pytest.approx(score(model, params, tokens, length=4, batch_size=2).nll_sum, rel=1e-3)


@pytest.mark.parametrize('row_chunks', [1, 2])
def test_does_not_depend_on_the_batch_size(row_chunks, model, make_params):
  if row_chunks > 1 and model.window is not None:
    pytest.skip('carries nothing')
  params = make_params(model)
  scores = [score(model, params, batch_size=size, row_chunks=row_chunks) for size in (1, 3, 8, 20)]
  assert {one.tokens for one in scores} == {one.bytes for one in scores} == {37}
  np.testing.assert_allclose([one.nll_sum for one in scores], scores[0].nll_sum, rtol=1e-6)


@pytest.mark.parametrize('num_tokens', range(2, 18))
def test_every_token_but_the_first_counts_once(num_tokens, make_model, make_params):
  model = make_model('transformer')
  params = make_params(model)
  # Token n stands for 2**n bytes: the sum of bytes tells which tokens were counted, and how often.
  tokens, byte_lengths = np.arange(num_tokens) % 11, 2 ** np.arange(11)
  found = score(model, params, tokens, byte_lengths)
  assert (found.tokens, found.bytes) == (num_tokens - 1, byte_lengths[tokens[1:]].sum())


def test_a_uniform_model_scores_the_logarithm_of_its_vocabulary(model, make_params):
  zeros = jax.tree.map(jnp.zeros_like, make_params(model))  # 12 logits of 0, of which one only pads
  found = score(model, zeros)
  np.testing.assert_allclose(found.loss_nats, math.log(11), rtol=1e-6)
  np.testing.assert_allclose(found.perplexity, 11, rtol=1e-5)


def test_bits_per_byte_of_characters_of_several_bytes(model, make_params):
  text = 'aé€😀' * 3 + 'a' + 'bcdefgh'
  tokenizer = text_build.train(base.TokenizerConfig(kind='char'), [text])
  assert tokenizer.vocab_size == 11
  tokens = tokenizer.encode('aé€😀a')
  found = score(model, jax.tree.map(jnp.zeros_like, make_params(model)), tokens, tokenizer.byte_lengths())
  # Four characters are predicted, of 2, 3, 4 and 1 bytes, at log2(11) bits each.
  assert (found.tokens, found.bytes) == (4, 10)
  np.testing.assert_allclose(found.bits_per_byte, 4 * math.log2(11) / 10, rtol=1e-6)


def test_perplexity_does_not_overflow():
  assert evaluate.Score(1e6, 10, 10).perplexity == math.exp(700)
  assert math.isnan(evaluate.Score(math.nan, 10, 10).perplexity)
