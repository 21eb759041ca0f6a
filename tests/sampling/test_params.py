import math

import numpy as np
import pytest

from textgen_jax import errors
from textgen_jax.sampling import knobs as knobs_lib
from textgen_jax.sampling import params


@pytest.mark.parametrize(
  ('field', 'value', 'constraint'),
  [
    ('temperature', -1.0, 'at least 0'),
    ('temperature', math.nan, 'finite'),
    ('temperature', math.inf, 'finite'),
    ('temperature', -math.inf, 'finite'),
    ('top_k', -1, 'at least 0'),
    ('top_p', 0.0, '(0, 1]'),
    ('top_p', -0.5, '(0, 1]'),
    ('top_p', 1.1, '(0, 1]'),
    ('top_p', math.nan, '(0, 1]'),
    ('min_p', -0.1, '[0, 1]'),
    ('min_p', 1.1, '[0, 1]'),
    ('min_p', math.nan, '[0, 1]'),
    ('seed', -1, '[0, 2**32)'),
    ('seed', 2**32, '[0, 2**32)'),
    ('num_samples', 0, 'at least 1'),
    ('max_new_tokens', -1, 'at least 0'),
    ('stop', ('',), 'at least one character'),
    ('stop', ('END', ''), 'at least one character'),
    ('stop', 'END', 'sequence of texts'),
    ('choices', 'END', 'sequence of texts'),
    ('choices', ('',), 'at least one character'),
    ('typical_p', 0.0, '(0, 1]'),
    ('typical_p', math.nan, '(0, 1]'),
    ('repetition_penalty', 0.0, 'above 0'),
    ('repetition_penalty', math.nan, 'finite'),
    ('presence_penalty', math.inf, 'finite'),
    ('frequency_penalty', math.nan, 'finite'),
    ('guidance', math.nan, 'finite'),
    ('length_penalty', math.inf, 'finite'),
    ('no_repeat_ngram', -1, 'at least 0'),
    ('min_new_tokens', 201, '[0, max_new_tokens=200]'),
    ('min_new_tokens', -1, '[0, max_new_tokens=200]'),
    ('min_log_prob', 0.0, 'below 0'),
    ('min_log_prob', math.nan, 'below 0'),
    ('logit_bias', ((3, math.nan),), 'finite'),
    ('logit_bias', ((-3, 1.0),), 'token id'),
    ('banned_tokens', (-1,), 'token ids'),
    ('stop_tokens', (1.5,), 'token ids'),
    ('alternatives', 65, '[0, 64]'),
    ('top_k', 1.5, 'at least 0'),
  ],
)
def test_a_rejected_value_is_named_with_its_constraint(field, value, constraint):
  with pytest.raises(errors.UserError) as caught:
    params.SamplingParams(**{field: value})
  message = str(caught.value)
  assert message.startswith(f'{field}={value!r} ')
  assert constraint in message
  assert '\n' not in message


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('temperature', 0.0),
    ('temperature', 1e300),
    ('top_k', 0),
    ('top_k', 2**31 - 1),
    ('top_p', 1.0),
    ('top_p', 1e-300),
    ('min_p', 0.0),
    ('min_p', 1.0),
    ('seed', 2**32 - 1),
    ('max_new_tokens', 0),
    ('stop', ()),
    ('stop', ['END']),
    ('logit_bias', {3: 1.0}),
    ('guidance', -2.0),
    ('min_new_tokens', 200),
    ('min_log_prob', -math.inf),
  ],
)
@pytest.mark.filterwarnings('error')
def test_the_ends_of_every_range_are_taken(field, value):
  settings = params.SamplingParams(**{field: value})
  rows, vocab = [settings, params.SamplingParams()], knobs_lib.Vocab(7)
  knobs = knobs_lib.Knobs.of(rows, np.zeros((2, 2), np.uint32), knobs_lib.Uses.of(rows, vocab), vocab)
  finite = {name: knob for name, knob in knobs._asdict().items() if knob is not None and name != 'min_log_prob_B'}
  assert all(np.isfinite(knob).all() for knob in finite.values())


@pytest.mark.parametrize(
  ('fields', 'told'),
  [
    ({'negative_prompt': 'a'}, 'negative_prompt needs a guidance'),
    ({'regex': 'a', 'choices': ('a',)}, 'regex and choices'),
    ({'best_of': 2, 'num_samples': 3}, 'best_of=2 is below num_samples=3'),
    ({'best_of': 2, 'temperature': 0}, 'best_of=2 at temperature=0'),
    ({'best_of': -1}, 'best_of=-1'),
    ({'stop_regex': '['}, r"stop_regex='\[' is not a regular expression"),
    ({'stop_regex': 'a*'}, 'matches the empty text'),
  ],
)
def test_fields_that_contradict_each_other(fields, told):
  with pytest.raises(errors.UserError, match=told):
    params.SamplingParams(**fields)


def test_settings_can_be_told_apart_in_a_set():
  lists = params.SamplingParams(stop=['a'], logit_bias={1: 2.0}, banned_tokens=[3])
  assert {lists, params.SamplingParams(stop=('a',), logit_bias=((1, 2.0),), banned_tokens=(3,))} == {lists}
