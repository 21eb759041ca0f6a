import math

import numpy as np
import pytest

from textgen_jax import errors
from textgen_jax.sampling import decode, params


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
  ],
)
@pytest.mark.filterwarnings('error')
def test_the_ends_of_every_range_are_taken(field, value):
  settings = params.SamplingParams(**{field: value})
  knobs = decode.Knobs.of([settings, params.SamplingParams()], np.zeros((2, 2), np.uint32))
  assert all(np.isfinite(knob).all() for knob in knobs)
