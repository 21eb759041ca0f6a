"""Beam search against all texts that there are, and against itself in Python."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling import test_settings

from textgen_jax import errors
from textgen_jax.models import build
from textgen_jax.sampling import generate, params
from textgen_jax.text import base, char

TOKENIZER = char.CharTokenizer.train(base.TokenizerConfig(), ['abcd'])  # and the end of the text
END = TOKENIZER.special_ids['end_of_text']
CONFIGS = {
  **test_settings.CONFIGS,
  'learned': dataclasses.replace(test_settings.CONFIGS['transformer'], position='learned'),
}
families = pytest.mark.parametrize('name', CONFIGS)


@functools.cache
def subject(name, context=8):
  model = build.build(CONFIGS[name], TOKENIZER.vocab_size, context)
  return model, test_settings.fill(model, np.random.default_rng(1), scale=0.5)


@functools.cache
def next_log_probs(name, ids, context=8):
  """What follows `ids`, by one plain forward pass over what the model may see of them."""
  model, weights = subject(name, context)
  hidden_BTD, _ = apply(model, weights, np.array([ids]))
  return np.asarray(jax.nn.log_softmax(hidden_BTD[0, -1]), np.float64)[: TOKENIZER.vocab_size]


@functools.partial(jax.jit, static_argnums=0)
def apply(model, weights, tokens_BT):
  hidden_BTD, cache = model.apply({'params': weights}, tokens_BT)
  return model.apply({'params': weights}, hidden_BTD, method='unembed'), cache


def every_text(prompt, longest, scores):
  """Each sequence that ends, or fills `longest` places, with its log-probability and each token's."""
  for size in range(1, longest + 1):
    for tokens in itertools.product(range(5), repeat=size):
      if END in tokens[:-1] or (size < longest and tokens[-1] != END):
        continue
      yield tokens, [scores((*prompt, *tokens[:t]))[token] for t, token in enumerate(tokens)]


@families
@pytest.mark.parametrize('penalty', [1.0, 0.0, 2.0, -0.5])
def test_as_many_beams_as_there_are_texts_find_them_all_in_order(name, penalty):
  settings = params.SamplingParams(max_new_tokens=3, num_beams=100, num_samples=85, length_penalty=penalty, log_probs=True)
  made = generate.generate(*subject(name), TOKENIZER, ['ab', 'd'], settings)
  assert len(made) == 2 * (1 + 4 + 16 * 5)
  for prompt in ('ab', 'd'):
    ids = tuple(TOKENIZER.encode(prompt).tolist())
    found = [one for one in made if one.prompt == prompt]
    texts = every_text(ids, 3, functools.partial(next_log_probs, name))
    every = sorted(((sum(each) / len(each) ** penalty, list(tokens), each) for tokens, each in texts), reverse=True)
    np.testing.assert_allclose([one.score for one in found], [score for score, _, _ in every], atol=1e-5)
    by_tokens = {tuple(tokens): each for _, tokens, each in every}
    for one in found:
      np.testing.assert_allclose(one.log_probs, by_tokens.pop(tuple(one.tokens)), atol=1e-5)
      assert one.finish_reason == ('end' if one.tokens[-1] == END else 'length')
    assert not by_tokens
    assert [one.sample_index for one in found] == list(range(85))


def search(prompt, size, longest, penalty, scores):
  """The same in Python, as the textbook has it: [(score, tokens)], the best first."""
  live, ended = [(0.0, ())], []
  for _ in range(longest):
    longer = [(total + score, (*tokens, i)) for total, tokens in live for i, score in enumerate(scores((*prompt, *tokens))) if score > -1e9]
    is_last = [tokens[-1] == END or len(tokens) == longest for _, tokens in longer]
    ended += [(total / len(tokens) ** penalty, tokens) for (total, tokens), last in zip(longer, is_last, strict=True) if last]
    live = sorted((one for one, last in zip(longer, is_last, strict=True) if not last), reverse=True)[:size]
  return sorted(ended, reverse=True)[:size]


@families
@pytest.mark.parametrize('size', [1, 3])
def test_few_beams_are_the_textbook_s(name, size):
  prompts = ['ab', '', 'dcb', 'a']
  each = [params.SamplingParams(max_new_tokens=5, num_beams=size, num_samples=size, length_penalty=p) for p in (1.0, 0.5, 0.0, 1.5)]
  made = generate.generate(*subject(name), TOKENIZER, prompts, each)
  expected = []
  for prompt, one in zip(prompts, each, strict=True):
    ids = tuple(TOKENIZER.encode(prompt).tolist()) or (END,)
    expected += search(ids, size, 5, one.length_penalty, functools.partial(next_log_probs, name))
  assert [tuple(one.tokens) for one in made] == [tokens for _, tokens in expected]
  np.testing.assert_allclose([one.score for one in made], [score for score, _ in expected], atol=1e-5)
  assert len({len(one.tokens) for one in made}) > 1


@pytest.mark.parametrize('name', ['learned', 'transformer'])
def test_far_past_the_context(name):
  """Several segments: what a beam read anew is its own text. The reference is one beam at a time, by force."""
  settings = params.SamplingParams(max_new_tokens=70, num_beams=3, num_samples=3, stop_at_end=False, log_probs=True)
  made = generate.generate(*subject(name, 16), TOKENIZER, ['ab'], settings)
  assert [one.score for one in made] == sorted((one.score for one in made), reverse=True)
  for one in made:
    assert len(one.tokens) == 70
    assert one.score == pytest.approx(sum(one.log_probs) / 70, abs=1e-5)
    assert one.drawn_log_probs is None
    forced = params.SamplingParams(max_new_tokens=70, temperature=0, stop_at_end=False, log_probs=True)
    follow = functools.partial(force, jnp.array(one.tokens))
    again = generate.generate(*subject(name, 16), TOKENIZER, ['ab'], forced, transforms=[follow])[0]
    assert again.tokens == one.tokens
    np.testing.assert_allclose(again.log_probs, one.log_probs, atol=2e-5)


def force(tokens_T, logits_BV, history):
  return jnp.where(jnp.arange(logits_BV.shape[1]) == tokens_T[history.drawn_B][:, None], logits_BV, -jnp.inf)


@pytest.mark.parametrize(
  ('changes', 'count'),
  [
    ({'repetition_penalty': 1.8}, 85),
    ({'no_repeat_ngram': 1, 'banned_tokens': (1,)}, 5),  # c and d, in any order, each once or not at all
    ({'guidance': 3.0, 'negative_prompt': 'cc'}, 85),
    ({'min_new_tokens': 2, 'stop_tokens': (2,)}, 3 * 3 * 5),
    ({'regex': 'a[bc]?d?'}, 6),
  ],
)
def test_settings_shape_what_is_searched(changes, count):
  """Scores are of the adjusted, renormalised distribution: over all texts that it allows it sums to 1."""
  settings = params.SamplingParams(max_new_tokens=3, num_beams=100, num_samples=count, **changes)
  made = generate.generate(*subject('lstm'), TOKENIZER, ['ab'], settings)
  assert len({tuple(one.tokens) for one in made}) == len(made) == count
  assert sum(np.exp(one.score * len(one.tokens)) for one in made) == pytest.approx(1, abs=1e-4)
  assert [one.score for one in made] == sorted((one.score for one in made), reverse=True)
  plain = generate.generate(*subject('lstm'), TOKENIZER, ['ab'], dataclasses.replace(settings, num_beams=0, num_samples=1, temperature=0))
  if count == 85:
    assert plain[0].tokens in [one.tokens for one in made[:20]]
  if 'regex' in changes:
    assert {one.text for one in made} == {'a', 'ab', 'ac', 'ad', 'abd', 'acd'}


def test_beams_of_several_sizes_beside_drawn_rows():
  each = [params.SamplingParams(max_new_tokens=6, num_beams=k, seed=1) for k in (2, 0, 3, 2)]
  prompts = ['ab', 'c', 'dd', 'a']
  together = generate.generate(*subject('transformer'), TOKENIZER, prompts, each)
  assert [one.prompt for one in together] == prompts
  for prompt, settings, one in zip(prompts, each, together, strict=True):
    (alone,) = generate.generate(*subject('transformer'), TOKENIZER, [prompt], settings)
    assert (alone.tokens, alone.finish_reason) == (one.tokens, one.finish_reason)
    assert (one.score is None) == (not settings.num_beams)


def test_no_token_at_all():
  (made,) = generate.generate(*subject('lstm'), TOKENIZER, ['a'], params.SamplingParams(max_new_tokens=0, num_beams=3))
  assert (made.text, made.finish_reason) == ('', 'length')


def test_weights_that_are_not_numbers_give_no_text():
  model, weights = subject('lstm')
  bad = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), weights)
  with pytest.raises(errors.NoGoodCheckpoint, match='not a number'):
    generate.generate(model, bad, TOKENIZER, ['ab'], params.SamplingParams(max_new_tokens=3, num_beams=3))


@pytest.mark.parametrize(
  ('changes', 'told'),
  [
    ({'num_beams': -1}, 'num_beams=-1 is not in'),
    ({'num_beams': 2000}, 'num_beams=2000 is not in'),
    ({'num_samples': 4}, 'num_beams=3 is below num_samples=4'),
    ({'temperature': 0.5}, 'leave temperature=0.5 at 1'),
    ({'top_k': 5}, 'draws nothing: leave top_k=5 at 0'),
    ({'best_of': 2}, 'leave best_of=2 at 0'),
    ({'stop': ('a',)}, "leave stop=('a',) at ()"),
    ({'min_log_prob': -3.0}, 'leave min_log_prob=-3.0'),
  ],
)
def test_what_makes_no_sense_is_refused(changes, told):
  with pytest.raises(errors.UserError, match=re.escape(told)):
    params.SamplingParams(**{'num_beams': 3, **changes})


def test_more_texts_than_there_are():
  settings = params.SamplingParams(max_new_tokens=3, num_beams=9, num_samples=3, choices=('ab', 'c'))
  with pytest.raises(errors.UserError, match="num_samples=3: these settings allow 2 texts after 'd'"):
    generate.generate(*subject('lstm'), TOKENIZER, ['d'], settings)


def test_beams_cannot_be_streamed():
  with pytest.raises(errors.UserError, match="num_beams=3: the text is known when it has ended, and can't be streamed"):
    next(generate.stream(*subject('lstm'), TOKENIZER, 'a', params.SamplingParams(num_beams=3)))
