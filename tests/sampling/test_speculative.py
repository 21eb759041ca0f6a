"""A draft changes how often the model is asked, and not how its texts are distributed."""

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
from textgen_jax.sampling import constraint, generate, params, sampler, speculative
from textgen_jax.sampling import knobs as knobs_lib
from textgen_jax.text import base, char

TOKENIZER, Settings = test_settings.TOKENIZER, test_settings.Settings
subject, write = test_settings.subject, test_settings.write
pairs = pytest.mark.parametrize(('name', 'draft_name'), [('transformer', 'lstm'), ('lstm', 'transformer')])


@dataclasses.dataclass(eq=False)
class Chain:
  """A model whose next token depends on the last one alone; its parameters are the logits, [V, V]."""

  vocab_size: int = 5
  context_length: int = 8
  slides = False
  window = None

  def apply(self, variables, x, cache=None, valid_BT=None, method=None):
    return variables['params'][x[..., 0].astype(int)] if method else (x[..., None].astype(float), cache)

  def init_cache(self, batch, length, rewinds=0):
    return jnp.zeros(batch)

  def rewind(self, cache, steps_B):
    return cache


def total_variation(samples, probabilities):
  """Between the frequencies of `samples` and the probabilities of all that can be."""
  kinds, counts = np.unique(samples, axis=0, return_counts=True)
  observed = {tuple(kind.tolist()): count / len(samples) for kind, count in zip(kinds, counts, strict=True)}
  assert observed.keys() <= probabilities.keys()
  return sum(abs(observed.get(kind, 0) - p) for kind, p in probabilities.items()) / 2


def draw(rows, prompt, settings, draft=None, **kwargs):
  """[rows, max_new_tokens] tokens of a chain with strong preferences; -1 after a row's end."""
  tables = np.random.default_rng(0).normal(size=(2, 5, 5)) * 1.5
  guess = None if draft is None else speculative.Draft(Chain(), jnp.asarray(tables[1]), draft)
  each = [settings] * rows
  states = [kwargs.pop('state')] * rows if 'state' in kwargs else ()
  vocab = knobs_lib.Vocab(5, kwargs.pop('end', None))
  made = sampler.Sampler(Chain(), jnp.asarray(tables[0]), [prompt] * rows, each, range(rows), vocab, draft=guess, states=states, **kwargs)
  tokens = np.full((rows, settings.max_new_tokens), -1)
  for b, one in next(iter(made)).items():
    tokens[b, : len(one.tokens)] = one.tokens
  return tokens, tables[0]


def test_two_hundred_thousand_draws_follow_the_model():
  settings = params.SamplingParams(max_new_tokens=4, temperature=0.8, top_k=4, seed=3, stop_at_end=False)
  tokens, table = draw(200_000, [2], settings, draft=2)
  next_VV = np.where(table >= np.sort(table, axis=1)[:, -4, None], np.exp(table / 0.8), 0)
  next_VV /= next_VV.sum(axis=1, keepdims=True)
  before_V = np.eye(5)[2]
  for t in range(3):  # each pair of neighbours, within a round of three and across its end
    before_V = before_V @ next_VV
    joint = {(a, b): before_V[a] * next_VV[a, b] for a, b in itertools.product(range(5), repeat=2)}
    assert total_variation(tokens[:, t : t + 2], joint) < 1e-2


@pytest.mark.parametrize('draft', [None, 2])
def test_two_hundred_thousand_constrained_draws_follow_the_renormalised_model(draft):
  tokenizer = char.CharTokenizer.train(base.TokenizerConfig(), ['abcd'])
  assert tokenizer.vocab_size == 5
  regex, settings = 'a[bc]{1,2}|d(ab)*', params.SamplingParams(max_new_tokens=4, regex='a[bc]{1,2}|d(ab)*', seed=4)
  end = tokenizer.special_ids['end_of_text']
  constraints = constraint.compile_constraints(tokenizer, [constraint.Wanted(regex)], 5)
  state = constraints.start(0, [end])
  tokens, table = draw(200_000, [end], settings, draft, end=end, table=constraints.table, state=state)

  def texts(beginning=''):
    """All that match and have room for an end, or fill all places."""
    every = (''.join(letters) for n in range(5) for letters in itertools.product('abcd', repeat=n))
    return [text for text in every if re.fullmatch(regex, text) and text.startswith(beginning)]

  expected = {}
  for text in texts():
    p, last, ids = 1.0, end, []
    for t, letter in enumerate([*text, ''][:4]):
      possible = {other[t : t + 1] for other in texts(text[:t])}
      id_of = {one: tokenizer.encode(one)[0] if one else end for one in possible}
      weights = {one: np.exp(table[last, i]) for one, i in id_of.items()}
      p, last = p * weights[letter] / sum(weights.values()), id_of[letter]
      ids.append(last)
    expected[tuple(ids + [-1] * (4 - len(ids)))] = p
  assert sum(expected.values()) == pytest.approx(1)
  assert len(expected) > 6
  assert total_variation(tokens, expected) < 1e-2


def force(tokens_BT, logits_BV, history):
  """A transform that has each row say what is given."""
  wanted_B = jnp.take_along_axis(tokens_BT, jnp.minimum(history.drawn_B, tokens_BT.shape[1] - 1)[:, None], axis=1)
  return jnp.where(jnp.arange(logits_BV.shape[1]) == wanted_B, logits_BV, -jnp.inf)


def assert_the_model_s_own(made, model, weights, prompts):
  """Each token's log-probability is what the model, without a draft, gives it there."""
  size = max(len(one.tokens) for one in made)
  tokens_BT = jnp.array([one.tokens + [0] * (size - len(one.tokens)) for one in made])
  settings = params.SamplingParams(max_new_tokens=size, temperature=0, stop_at_end=False, log_probs=True)
  with pytest.MonkeyPatch.context() as patch:  # the transform knows rows by their places
    patch.setattr(generate.os, 'cpu_count', lambda: 1)
    again = generate.generate(model, weights, TOKENIZER, prompts, settings, transforms=[functools.partial(force, tokens_BT)])
  for one, other in zip(made, again, strict=True):
    assert other.tokens[: len(one.tokens)] == one.tokens
    np.testing.assert_allclose(one.log_probs, other.log_probs[: len(one.tokens)], atol=2e-5)


@pairs
def test_every_setting(name, draft_name):
  """A model that guesses for itself writes what it writes alone; any draft keeps to the settings."""
  rows = [dataclasses.replace(one, log_probs=True) for one in test_settings.many_settings() if one.guidance == 1]
  prompts = ['abc'[: 1 + i % 3] + 'hide 3'[i % 6 :] for i in range(len(rows))]
  plain = write(name, prompts, rows)
  for one, other in zip(plain, write(name, prompts, rows, draft=speculative.Draft(*subject(name), 3)), strict=True):
    assert (one.tokens, one.text, one.finish_reason) == (other.tokens, other.text, other.finish_reason)
    np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)
    np.testing.assert_allclose(one.drawn_log_probs, other.drawn_log_probs, atol=1e-4)
  drafted = write(name, prompts, rows, draft=speculative.Draft(*subject(draft_name), 3))
  assert_the_model_s_own(drafted, *subject(name), prompts)
  for settings, one, other in zip(rows, plain, drafted, strict=True):
    if settings.temperature == 0:
      assert other.tokens == one.tokens
    assert re.fullmatch(settings.regex or '.*', other.text, re.DOTALL)
    assert not settings.choices or other.text in settings.choices
    assert not set(settings.banned_tokens) & set(other.tokens)
    assert np.isfinite(other.drawn_log_probs).all()  # each could be drawn
  assert sum(one.tokens != other.tokens for one, other in zip(plain, drafted, strict=True)) > 20


@functools.cache
def random_weights(name, context, seed):
  """A small model of a family, or with learned positions; its weights, and the same with noise."""
  config = test_settings.CONFIGS['lstm' if name == 'lstm' else 'transformer']
  config = config if name == 'lstm' else dataclasses.replace(config, position=name)
  model = build.build(config, TOKENIZER.vocab_size, context)
  rng = np.random.default_rng(seed)
  own = test_settings.fill(model, rng)
  return model, own, jax.tree.map(jnp.add, own, test_settings.fill(model, rng, scale=0.08))


@pytest.mark.parametrize('name', ['rotary', 'learned', 'lstm'])
@pytest.mark.parametrize('draft', ['itself', 'noisy copy', 'stranger', 'stranger with a short context'])
def test_rows_that_wait_for_each_other_over_several_segments(name, draft):
  """Ragged rows past the context, by a draft that is right now and then: some rows are ahead, and wait at each segment's end."""
  prompts = ['abc', 'a fig ' * 4, '', 'kk', '0123456789 abcdef']
  for seed in (1, 2) if draft == 'itself' else (1,):
    model, weights, noisy = random_weights(name, 16, seed)
    strange = random_weights('lstm' if name != 'lstm' else 'learned', 64 if draft == 'stranger' else 8, seed + 7)
    own = weights if draft == 'itself' else noisy
    guess = speculative.Draft(*strange[:2], 3) if 'stranger' in draft else speculative.Draft(model, own, 4)
    settings = [Settings(max_new_tokens=105, temperature=0.3 * i, seed=seed, log_probs=True) for i in range(5)]
    plain = generate.generate(model, weights, TOKENIZER, prompts, settings)
    drafted = generate.generate(model, weights, TOKENIZER, prompts, settings, draft=guess)
    same = [one.tokens == other.tokens for one, other in zip(plain, drafted, strict=True)]
    assert same[0]  # the likeliest token each time
    assert all(same) or draft != 'itself'
    assert_the_model_s_own(drafted, model, weights, prompts)


@test_settings.families
def test_a_draft_that_knows_better_saves_calls(name):
  """The model as its own draft is right each time; one that knows nothing of it is hardly ever."""
  model, weights = subject(name)
  prompts, settings = [TOKENIZER.encode(text).tolist() for text in ('abc', 'k', 'a fig')], [Settings(max_new_tokens=64, seed=2)] * 3
  others = jax.tree.map(lambda x: -x, weights)
  rounds = {}
  for kind, draft in (('own', weights), ('other', others)):
    guess = speculative.Draft(model, draft, 4)
    made = sampler.Sampler(model, weights, prompts, settings, range(3), knobs_lib.Vocab(24), draft=guess, segment=32)
    tokens = [token for segment in made for token in segment[0].tokens]
    assert len(tokens) == 64
    rounds[kind] = made.rounds
  # Six rounds of five tokens and one of two, whose guesses are taken back, in each of two segments.
  assert rounds['own'] == 3 * 2 * 7
  assert rounds['other'] > 1.4 * rounds['own']


@pytest.mark.parametrize(
  ('changes', 'settings', 'told'),
  [
    ({'tokens': 0}, {}, 'tokens=0 is not in'),
    ({'tokens': 65}, {}, 'tokens=65 is not in'),
    ({}, {'guidance': 2.0}, 'leave guidance at 1'),
    ({'model': Chain()}, {}, 'vocabulary of 5'),
  ],
)
def test_what_cannot_be_is_refused(changes, settings, told):
  draft = speculative.Draft(*subject('lstm'))._replace(**changes)
  with pytest.raises(errors.UserError, match=re.escape(told)):
    write('lstm', ['a'], Settings(**settings), draft=draft)


def test_a_stream_is_the_same():
  settings, draft = Settings(max_new_tokens=50, seed=3, stop=('k',)), speculative.Draft(*subject('transformer'))
  pieces = generate.stream(*subject('lstm'), TOKENIZER, 'ab', settings, draft=draft)
  assert ''.join(pieces) == write('lstm', ['ab'], settings, draft=draft)[0].text
