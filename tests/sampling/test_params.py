import dataclasses
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
    ('length_penalty', math.inf, '[-10, 10]'),
    ('length_penalty', math.nan, '[-10, 10]'),
    ('length_penalty', 400.0, '[-10, 10]'),  # 9 ** 400 is no float
    ('length_penalty', -400.0, '[-10, 10]'),  # and 9 ** -400 is 0
    ('length_penalty', 10.1, '[-10, 10]'),
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
    ('top_k', 1.5, 'a whole number'),
    ('top_k', True, 'a whole number'),
    ('top_k', '3', 'a whole number'),
    ('seed', 2.0, 'a whole number'),
    ('best_of', 2.5, 'a whole number'),
    ('best_of', -1, '[0, 2**20)'),
    ('lines', np.float32(1), 'a whole number'),
    ('min_new_tokens', 0.5, 'a whole number'),
    ('temperature', True, 'a number'),
    ('temperature', 'hot', 'a number'),
    ('temperature', 1j, 'a number'),
    ('top_p', '0.5', 'a number'),
    ('min_p', (0.5,), 'a number'),
    ('min_log_prob', '-1', 'a number'),
    ('min_log_prob', math.inf, 'below 0'),
    ('guidance', b'2', 'a number'),
    ('stop_at_end', 1, 'True or False'),
    ('log_probs', 'no', 'True or False'),
    ('regex', 5, 'a text'),
    ('stop_regex', b'a', 'a text'),
    ('negative_prompt', ['a'], 'a text'),
    ('stop', (5,), 'texts'),
    ('stop', ('a', b'b'), 'texts'),
    ('stop', b'ab', 'sequence of texts'),
    ('choices', {'a': 1}, 'sequence of texts'),
    ('choices', (None,), 'texts'),
    ('banned_tokens', 5, 'sequence of token ids'),
    ('banned_tokens', '5', 'sequence of token ids'),
    ('banned_tokens', (True,), 'token ids'),
    ('banned_tokens', {3: 1.0}, 'sequence of token ids'),
    ('stop_tokens', b'ab', 'sequence of token ids'),
    ('stop_tokens', (2**31,), 'token ids'),
    ('logit_bias', 3, 'sequence of (token id, finite number)'),
    ('logit_bias', (3,), 'token id'),
    ('logit_bias', ((1, 'x'),), 'finite number'),
    ('logit_bias', ((1, True),), 'finite number'),
    ('logit_bias', ((1, 2.0, 3.0),), 'token id'),
    ('logit_bias', {'a': 1.0}, 'token id'),
  ],
)
def test_a_rejected_value_is_named_with_its_constraint(field, value, constraint):
  with pytest.raises(errors.UserError) as caught:
    params.SamplingParams(**{field: value})
  message = str(caught.value)
  assert message.startswith(f'{field}={value!r} ')
  assert constraint in message
  assert '\n' not in message


@pytest.mark.parametrize('field', dataclasses.fields(params.SamplingParams), ids=lambda field: field.name)
@pytest.mark.parametrize('value', [None, object(), np.zeros((2, 1)), 10**400, float], ids=['None', 'object', 'array', 'huge', 'type'])
def test_what_no_field_can_be_is_told_in_a_line(field, value):
  with pytest.raises(errors.UserError) as caught:
    params.SamplingParams(**{field.name: value})
  message = str(caught.value)
  assert message.startswith(f'{field.name}=')
  assert ' is not ' in message
  assert '\n' not in message
  assert len(message) < 250


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
    ('length_penalty', 10),
    ('length_penalty', -10.0),
    ('temperature', np.float32(0.5)),
    ('temperature', 2),
    ('top_p', np.float64(0.5)),
    ('top_k', np.int64(5)),
    ('log_probs', np.True_),
    ('stop_tokens', np.arange(7)),
    ('stop_tokens', tuple(range(7)) * 20),
    ('logit_bias', [[np.int32(3), np.float32(1)]]),
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
  assert params.SamplingParams(logit_bias=[[1, 2.0]]) in {params.SamplingParams(logit_bias={1: 2.0})}
  assert params.SamplingParams(stop={'b', 'c', 'a'}).stop == ('a', 'b', 'c')  # in every process
  assert params.SamplingParams(stop_tokens=(i for i in (3, 1))).stop_tokens == (3, 1)


def test_batch_sizes():
  for size in (1, params.BATCH_SIZE, np.int64(8), params.MAX_BATCH_SIZE):
    params.check_batch_size(size)
  for size in (0, -1, 1.0, True, '8', None, params.MAX_BATCH_SIZE + 1):
    with pytest.raises(errors.UserError) as caught:
      params.check_batch_size(size)
    assert str(caught.value) == f'batch_size={size!r} is not a whole number in [1, 1048576]'
