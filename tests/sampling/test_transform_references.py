"""The transforms against stored outputs of Hugging Face transformers; see fixtures/make_transforms.py for where the two differ."""

import pathlib

import jax
import numpy as np
import pytest

from textgen_jax.sampling import history, transforms

REFERENCES = pathlib.Path(__file__).parent.parent / 'fixtures' / 'transforms.npz'


@pytest.fixture(scope='module')
def stored():
  with np.load(REFERENCES) as file:
    arrays = dict(file)
  size = arrays['logits'].shape[1]
  prompts = [row[:length].tolist() for row, length in zip(arrays['tokens'], arrays['prompt_length'], strict=True)]
  drawn = zip(arrays['tokens'], arrays['prompt_length'], arrays['length'], strict=True)
  count_BV = np.stack([np.bincount(row[start:stop], minlength=size) for row, start, stop in drawn]).astype(np.int32)
  arrays['history'] = history.History(
    arrays['length'] - arrays['prompt_length'], arrays['tokens'], arrays['length'], history.in_prompts(prompts, size), count_BV
  )
  return arrays


@pytest.mark.parametrize(
  ('name', 'settings'),
  [
    ('top_k', ['top_k']),
    ('top_p', ['top_p']),
    ('min_p', ['min_p']),
    ('typical_p', ['typical_p']),
    ('no_repeat_ngram', ['history', 'no_repeat_ngram']),
    ('min_length', ['history', 'min_length', 'ends']),
  ],
)
def test_keeps_what_the_reference_keeps(stored, name, settings):
  logits_BV = stored['logits']
  out_BV = np.asarray(jax.jit(getattr(transforms, name))(logits_BV, *(stored[key] for key in settings)))
  expected_BV = np.where(stored[f'kept_{name}'], logits_BV, -np.inf)
  assert (out_BV == expected_BV).all()
  changed_B = (expected_BV != logits_BV).any(axis=1)
  assert changed_B.mean() > 0.3  # the reference has something to say


@pytest.mark.parametrize(
  ('name', 'settings'),
  [
    ('repetition_penalty', ['history', 'repetition_penalty']),
    ('presence_penalty', ['history', 'presence_penalty']),
    ('frequency_penalty', ['history', 'frequency_penalty']),
    ('logit_bias', ['bias']),
  ],
)
def test_changes_logits_as_the_reference_does(stored, name, settings):
  logits_BV, expected_BV = stored['logits'], stored[f'out_{name}']
  out_BV = np.asarray(jax.jit(getattr(transforms, name))(logits_BV, *(stored[key] for key in settings)))
  np.testing.assert_allclose(out_BV, expected_BV, rtol=1e-6, atol=1e-6)
  assert (expected_BV != logits_BV).any(axis=1).mean() > 0.3


def test_temperature_gives_the_reference_distribution(stored):
  # Ours subtracts the likeliest logit first.
  out_BV = jax.jit(transforms.temperature)(stored['logits'], stored['temperature'])
  np.testing.assert_allclose(jax.nn.log_softmax(out_BV), jax.nn.log_softmax(stored['out_temperature']), rtol=1e-5, atol=1e-4)


def test_guide_gives_the_reference_logits(stored):
  expected_BV, impossible_BV = stored['out_guide'], stored['logits'] == -np.inf
  # -inf - -inf: the reference has NaN for tokens of the padding, where ours has -inf.
  assert (np.isnan(expected_BV) == impossible_BV).all()
  out_BV = jax.jit(transforms.guide)(stored['logits'], stored['negative'], stored['scale'])
  np.testing.assert_allclose(out_BV, np.where(impossible_BV, -np.inf, expected_BV), rtol=1e-5, atol=1e-4)
