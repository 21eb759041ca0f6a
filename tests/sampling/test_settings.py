"""Every setting through the whole sampler: alone, beside others, and against the model's own account."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from textgen_jax import errors
from textgen_jax.models import build, lstm, transformer
from textgen_jax.sampling import batch, decode, generate, params, sampler
from textgen_jax.text import base, char

TOKENIZER = char.CharTokenizer.train(base.TokenizerConfig(), ['\n abcdefghijk0123456789'])
END = TOKENIZER.special_ids['end_of_text']
CONFIGS = {
  'transformer': transformer.TransformerConfig(dim=16, num_layers=2, num_heads=2, vocab_multiple=8, compute_dtype='float32'),
  'lstm': lstm.LSTMConfig(dim=16, num_layers=2, compute_dtype='float32'),
}
Settings = functools.partial(params.SamplingParams, max_new_tokens=20, stop_at_end=False)
families = pytest.mark.parametrize('name', CONFIGS)


@functools.cache
def subject(name):
  model = build.build(CONFIGS[name], TOKENIZER.vocab_size, 64)
  return model, fill(model, np.random.default_rng(0))


def fill(model, rng, scale=0.4):
  """Random parameters of any model."""
  shapes = jax.eval_shape(functools.partial(model.init, method='init_everything'), jax.random.key(0), jnp.zeros((2, 4), jnp.int32))
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(scale=scale, size=leaf.shape), leaf.dtype), nn.meta.unbox(shapes)['params'])


def write(name, prompts, settings, **kwargs):
  return generate.generate(*subject(name), TOKENIZER, prompts, settings, **kwargs)


def many_settings():
  """Forty that differ, each transform among them."""
  rng = np.random.default_rng(7)
  kinds = [
    {'temperature': 0.0},
    {'temperature': 1.4, 'top_k': 4},
    {'top_p': 0.7},
    {'min_p': 0.1},
    {'typical_p': 0.6},
    {'repetition_penalty': 1.7},
    {'presence_penalty': 1.5},
    {'frequency_penalty': 0.8},
    {'no_repeat_ngram': 2},
    {'logit_bias': ((3, 2.0), (5, -4.0))},
    {'banned_tokens': (2, 4, 6)},
    {'min_new_tokens': 9, 'stop_tokens': (1, 7)},
    {'guidance': 2.5, 'negative_prompt': 'kk0'},
    {'regex': '[a-d]{3,20}'},
    {'choices': ('fed a cab', 'bad 0123')},
    {'min_log_prob': -30.0},
  ]
  return [Settings(seed=i, **{'temperature': float(rng.uniform(0.5, 1.5)), **kinds[i % len(kinds)]}) for i in range(40)]


@families
def test_forty_settings_in_one_batch_are_one_compile_and_each_row_is_its_own(name):
  rows = many_settings()
  prompts = ['abc'[: 1 + i % 3] + 'hide 3'[i % 6 :] for i in range(40)]
  before = decode.decode._cache_size()
  together = write(name, prompts, rows)
  assert decode.decode._cache_size() == before + 1
  assert len({tuple(completion.tokens) for completion in together}) > 30
  for i in range(40):  # sixteen kinds of settings: each compiles another program
    assert write(name, prompts[i : i + 1], rows[i]) == together[i : i + 1]
  assert write(name, prompts[::-1], rows[::-1]) == together[::-1]


@families
def test_ragged_prompts_at_any_batch_size_in_any_order(name):
  rng = np.random.default_rng(3)
  prompts = [TOKENIZER.decode(rng.integers(12, size=size)) for size in rng.integers(1, 50, size=64)]
  settings = Settings(max_new_tokens=12, temperature=0.9, seed=5)
  together = write(name, prompts, settings)
  threes = [one for low in range(0, 64, 3) for one in write(name, prompts[low : low + 3], settings)]
  assert threes == together
  order = rng.permutation(64)
  shuffled = write(name, [prompts[i] for i in order], settings)
  assert shuffled == [together[i] for i in order]
  for i in order:
    assert write(name, [prompts[i]], settings) == [together[i]]


@families
def test_log_probabilities_are_the_model_s(name):
  model, weights = subject(name)
  kinds = [(0.7, 5), (1.3, 0), (0, 0)]
  settings = [Settings(seed=i, temperature=t, top_k=k, alternatives=3, log_probs=True) for i, (t, k) in enumerate(kinds)]
  for one, setting in zip(write(name, ['abc', 'k', 'a fig'], settings), settings, strict=True):
    prompt = batch.prompt_ids(TOKENIZER, one.prompt)
    tokens_BT = np.array([prompt + one.tokens])
    hidden_BTD, _ = model.apply({'params': weights}, tokens_BT)
    log_probs_TV = jax.nn.log_softmax(model.apply({'params': weights}, hidden_BTD, method='unembed')[0])[len(prompt) - 1 : -1]
    np.testing.assert_allclose(one.log_probs, log_probs_TV[np.arange(20), one.tokens], atol=1e-5)
    np.testing.assert_allclose(one.entropies, -(np.exp(log_probs_TV) * np.maximum(log_probs_TV, -1e9)).sum(axis=1), atol=1e-5)
    for others, log_probs_V in zip(one.alternatives, log_probs_TV, strict=True):
      assert [i for i, _ in others] == np.argsort(-log_probs_V)[:3].tolist()
      np.testing.assert_allclose([value for _, value in others], np.sort(log_probs_V)[::-1][:3], atol=1e-5)
    if setting.temperature == 0:
      assert one.drawn_log_probs == [0] * 20
      continue
    expected_TV = np.asarray(log_probs_TV) / setting.temperature
    if setting.top_k:
      expected_TV = np.where(expected_TV >= np.sort(expected_TV)[:, -setting.top_k, None], expected_TV, -np.inf)
    expected_TV = jax.nn.log_softmax(expected_TV)
    np.testing.assert_allclose(one.drawn_log_probs, expected_TV[np.arange(20), one.tokens], atol=2e-5)


@families
@pytest.mark.parametrize('regex', ['[a-f]{2,6} (19|20)\\d\\d', '(ab|cd)*k', '[^a]{1,5}\n'])
def test_constrained_texts_match_at_any_temperature(name, regex):
  made = write(name, [''], params.SamplingParams(max_new_tokens=16, temperature=1.5, num_samples=1000, regex=regex))
  assert all(re.fullmatch(regex, one.text) for one in made)
  assert len({one.text for one in made}) > 20


def test_constrained_draws_follow_the_renormalised_model():
  model, weights = subject('lstm')
  made = write('lstm', ['c'], Settings(max_new_tokens=2, temperature=1.0, num_samples=4000, seed=1, regex='[abc]k'))
  hidden_BTD, _ = model.apply({'params': weights}, np.array([TOKENIZER.encode('c')]))
  logits_V = np.asarray(model.apply({'params': weights}, hidden_BTD, method='unembed')[0, -1], np.float64)[TOKENIZER.encode('abc')]
  expected = np.exp(logits_V) / np.exp(logits_V).sum()
  observed = np.array([sum(one.text == text for one in made) for text in ('ak', 'bk', 'ck')]) / 4000
  assert np.abs(observed - expected).sum() / 2 < 0.03


@families
def test_best_of_keeps_the_likeliest(name):
  drawn = write(name, ['ab'], Settings(num_samples=9, seed=4, log_probs=True))
  best = write(name, ['ab'], Settings(num_samples=2, best_of=9, seed=4))
  ranked = sorted(drawn, key=lambda one: sum(one.log_probs), reverse=True)
  assert [one.text for one in best] == [one.text for one in ranked[:2]]
  assert [one.score for one in best] == pytest.approx([sum(one.log_probs) / 20 for one in ranked[:2]])
  assert best[0].log_probs is None  # nobody asked


def test_a_stop_token_ends_the_text_and_counts():
  free = write('lstm', ['a'], Settings(max_new_tokens=60, seed=2))[0]
  stop = free.tokens[37]
  cut = write('lstm', ['a'], Settings(max_new_tokens=60, seed=2, stop_tokens=(stop,)))[0]
  assert (cut.tokens, cut.finish_reason) == (free.tokens[: free.tokens.index(stop) + 1], 'stop')
  later = write('lstm', ['a'], Settings(max_new_tokens=60, seed=2, stop_tokens=(stop,), min_new_tokens=50))[0]
  assert len(later.tokens) >= 50
  assert stop not in later.tokens[:50]


def test_a_text_ends_where_it_gets_too_unlikely():
  free = write('lstm', ['a'], Settings(max_new_tokens=60, seed=2, log_probs=True))[0]
  sums = np.cumsum(free.log_probs)
  cut = write('lstm', ['a'], Settings(max_new_tokens=60, seed=2, min_log_prob=float(sums[30])))[0]
  assert len(cut.tokens) == int(np.argmax(sums < sums[30])) + 1
  assert cut.finish_reason == 'log_prob'


@pytest.mark.parametrize('scale', [0.0, 1.0, 3.0])
def test_guidance_reads_both_prompts(scale):
  model, weights = subject('transformer')
  one = write('transformer', ['abc'], Settings(temperature=0, guidance=scale, **({'negative_prompt': 'k0 '} if scale != 1 else {})))[0]
  rows = []
  for prompt in ('abc', 'k0 '):
    read = TOKENIZER.encode(prompt).tolist()
    hidden_BTD, _ = model.apply({'params': weights}, np.array([read + one.tokens]))
    logits_BTV = model.apply({'params': weights}, hidden_BTD, method='unembed')
    rows.append(jax.nn.log_softmax(logits_BTV[0, len(read) - 1 : -1, : TOKENIZER.vocab_size]))
  assert one.tokens == np.argmax(rows[1] + scale * (rows[0] - rows[1]), axis=-1).tolist()


def test_no_ngram_occurs_twice():
  made = write('lstm', ['ababab'], Settings(max_new_tokens=80, temperature=0, no_repeat_ngram=2))[0]
  ids = [*batch.prompt_ids(TOKENIZER, 'ababab'), *made.tokens]
  drawn = list(itertools.pairwise(ids))[5:]
  assert len(set(drawn)) == len(drawn)


def test_a_caller_s_own_transform():
  def only_even(logits_BV, history):
    return jnp.where(jnp.arange(logits_BV.shape[1]) % 2 == history.drawn_B[:, None] % 2, logits_BV, -jnp.inf)

  made = write('lstm', ['a', 'bc'], Settings(seed=1), transforms=[only_even])
  assert all(token % 2 == i % 2 for one in made for i, token in enumerate(one.tokens))


@pytest.mark.parametrize(
  ('transform', 'error', 'told'),
  [
    (lambda logits_BV, history: logits_BV * jnp.nan, errors.NoGoodCheckpoint, 'a transform leaves no token'),
    (lambda logits_BV, history: jnp.full_like(logits_BV, -jnp.inf), errors.NoGoodCheckpoint, 'a transform leaves no token'),
    (lambda logits_BV, history: logits_BV[:, :5], errors.UserError, 'transforms: .* gives an array of shape'),
    (lambda logits_BV, history: 0.0, errors.UserError, 'transforms: .* gives an array of shape'),
  ],
)
@pytest.mark.parametrize('beams', [0, 2])
def test_a_transform_that_cannot_be(transform, error, told, beams):
  with pytest.raises(error, match=told):
    write('lstm', ['a'], Settings(max_new_tokens=3, num_beams=beams), transforms=[transform])


def test_huge_biases_cancel():
  plain = write('lstm', ['a'], Settings(seed=1))
  assert write('lstm', ['a'], Settings(seed=1, logit_bias=((3, 1e308), (3, -1e308)))) == plain
  assert set(write('lstm', ['a'], Settings(seed=1, logit_bias=((3, 1e308),)))[0].tokens) == {3}


def test_weights_that_are_not_numbers_give_no_token():
  model, weights = subject('lstm')
  bad = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), weights)
  with pytest.raises(errors.NoGoodCheckpoint, match='not a number'):
    generate.generate(model, bad, TOKENIZER, ['ab'], Settings(temperature=0))


@pytest.mark.parametrize(
  ('fields', 'told'),
  [
    ({'banned_tokens': (99,)}, 'banned_tokens: 99 is not an id'),
    ({'stop_tokens': (TOKENIZER.vocab_size,)}, 'stop_tokens'),
    ({'logit_bias': ((99, 1.0),)}, 'logit_bias: 99'),
    ({'banned_tokens': tuple(range(TOKENIZER.vocab_size))}, 'tokens is banned'),
    ({'regex': 'xyz'}, 'no text that this vocabulary can spell'),
    ({'regex': '['}, 'regex'),
    ({'regex': 'a{30}'}, 'max_new_tokens=20 is below 30'),
    ({'choices': ('xyz',)}, "can't spell 'xyz'"),
    ({'alternatives': 50}, 'alternatives=50 is above'),
  ],
)
def test_what_the_vocabulary_cannot_give_is_refused_before_compiling(fields, told, monkeypatch):
  monkeypatch.setattr(sampler.Sampler, '__iter__', lambda self: pytest.fail('compiled'))
  with pytest.raises(errors.UserError, match=re.escape(told)) as caught:
    write('lstm', ['a'], Settings(**fields))
  assert '\n' not in str(caught.value)


def test_a_prompt_past_the_limit_is_refused(monkeypatch):
  monkeypatch.setattr(params, 'MAX_PROMPT_TOKENS', 5)
  assert batch.prompt_ids(TOKENIZER, 'abcde') == TOKENIZER.encode('abcde').tolist()
  with pytest.raises(errors.UserError, match="prompt 'abcdef': its 6 tokens are more than 5"):
    write('lstm', ['a', 'abcdef'], Settings())


def test_a_row_without_log_probabilities_does_not_tell_them():
  rows = write('lstm', ['a', 'a'], [Settings(), Settings(log_probs=True, alternatives=2)])
  assert set(rows[0].row()) == {'prompt', 'text', 'tokens', 'sample_index', 'seed', 'finish_reason'}
  assert set(rows[1].row()) > {'log_probs', 'drawn_log_probs', 'entropies', 'alternatives'}
  assert math.isclose(rows[1].alternatives[0][0][1], max(value for _, value in rows[1].alternatives[0]))
  assert dataclasses.asdict(rows[0])['tokens'] == rows[1].tokens


@pytest.mark.parametrize(
  ('rule', 'expected'),
  [
    ({'stop_regex': 'c[0-9]'}, lambda text: (text[: re.search('c[0-9]', text).start()], 'stop')),
    ({'lines': 2}, lambda text: ('\n'.join(text.split('\n')[:2]), 'lines')),
  ],
)
def test_a_text_ends_where_its_rule_has_it_end(rule, expected):
  settings = Settings(max_new_tokens=400, seed=8)
  free = write('lstm', ['a'], settings)[0].text
  cut = write('lstm', ['a'], dataclasses.replace(settings, **rule))[0]
  assert (cut.text, cut.finish_reason) == expected(free)
  assert len(cut.text) < len(free)
  pieces = list(generate.stream(*subject('lstm'), TOKENIZER, 'a', dataclasses.replace(settings, **rule)))
  assert ''.join(pieces) == cut.text
