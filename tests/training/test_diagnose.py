import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from textgen_jax import trees
from textgen_jax.models import lstm, transformer
from textgen_jax.training import diagnose, step

KEY = jax.random.PRNGKey(3)


@functools.cache
def build(kind):
  if kind == 'lstm':
    return lstm.LSTM(lstm.LSTMConfig(dim=8, num_layers=3, dropout=0.1, vocab_multiple=4), 11, 6)
  how = {'remat': {'remat': 'full'}, 'scan': {'scan_layers': True}, 'scan_remat': {'remat': 'dots', 'scan_layers': True}}.get(kind, {})
  config = transformer.TransformerConfig(dim=8, num_layers=2, num_heads=2, dropout=0.1, vocab_multiple=4, **how)
  return transformer.Transformer(config, 11, 6)


@functools.cache
def finder(kind, accumulation_steps=1):
  return diagnose.make_diagnose(build(kind), step.no_hook, accumulation_steps)


def with_one(params, name, value):
  """The parameters with another first number in one of them."""
  return trees.map_with_names(lambda n, x: x.at[(0,) * x.ndim].set(value) if n == name else x, params)


def carry_of(model, rows):
  return model.init_cache(rows, 0) if model.window is None else None


@pytest.mark.parametrize(
  ('kind', 'name', 'layer'),
  [
    ('transformer', 'block_1/mlp/down/kernel', 'block_1/mlp/down'),
    ('transformer', 'block_0/attention/query/kernel', 'block_0/attention/query'),
    ('transformer', 'final_norm/scale', 'final_norm'),
    ('transformer', 'unembedding/kernel', 'unembedding'),
    ('remat', 'block_1/attention/output/kernel', 'block_1/attention/output'),
    ('scan', 'block_1/attention/output/kernel', 'block_1/attention/output'),
    ('scan_remat', 'block_0/mlp/down/kernel', 'block_0/mlp/down'),
    ('scan', 'final_norm/scale', 'final_norm'),
    ('lstm', 'layer_1/input/kernel', 'layer_1/input'),
    ('lstm', 'layer_1/recurrent_kernel', 'layer_1'),  # inside the scan over time
  ],
)
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_names_the_layer_whose_parameter_went_bad(kind, name, layer, value, make_params, make_batch):
  model = build(kind)
  params = with_one(make_params(model), name, value)
  said = finder(kind)(params, carry_of(model, 4), make_batch(4), KEY)
  assert said == f"parameter {name} is not finite; the first activation that is not finite is {layer}'s"


@pytest.mark.parametrize('kind', ['transformer', 'scan'])
def test_numbers_that_overflow_in_a_layer_are_named_although_all_parameters_are_finite(kind, make_params, make_batch):
  model = build(kind)
  params = with_one(make_params(model), 'block_0/mlp/up/kernel', 3e30)  # its square isn't finite
  said = finder(kind)(params, None, make_batch(4), KEY)
  assert said == "the first activation that is not finite is block_0/mlp/down's"


def test_a_carry_that_is_not_finite(make_params, make_batch):
  model = build('lstm')
  carry = jax.tree.map(lambda x: x.at[3, 1, 0].set(jnp.nan), carry_of(model, 4))
  find = diagnose.make_diagnose(model, step.no_hook, 2)  # row 3 is in the second micro-batch
  assert find(make_params(model), carry, make_batch(4), KEY).startswith(
    "the carried state is not finite; the first activation that is not finite is layer_1's"
  )


def bad_term(inputs):
  return jnp.nan * inputs.hidden_BTD.sum(), {}


def bad_gradient_at(inputs):
  """Finite, with a gradient that isn't: the root's at 0."""
  return jnp.sqrt(0.0 * jnp.abs(inputs.hidden_BTD).sum()), {}


def large_gradient(inputs):
  """Of 0 and 1e30."""
  hidden_BTD = inputs.hidden_BTD - jax.lax.stop_gradient(inputs.hidden_BTD)
  return 1e30 * hidden_BTD.sum(), {}


def test_a_loss_that_a_module_has_sown_is_not_the_hook_s(make_params, make_batch):
  config = lstm.LSTMConfig(dim=8, num_layers=1, activation_penalty=float(np.finfo(np.float32).max), vocab_multiple=4)
  model = lstm.LSTM(config, 11, 6)
  params = jax.tree.map(lambda x: 30 * x, make_params(model))  # hidden states near 1
  said = diagnose.make_diagnose(model, step.no_hook, 1)(params, carry_of(model, 4), make_batch(4), KEY)
  assert said == 'all activations and losses of tokens are finite; what modules have sown as losses is not'


@pytest.mark.parametrize('kind', ['transformer', 'lstm'])
@pytest.mark.parametrize(
  ('hook', 'said'),
  [
    (bad_term, 'all activations and losses of tokens are finite; the term of the loss hook is not'),
    (bad_gradient_at, "activations and loss are finite; the gradient of the loss hook's term is not, first in that of"),
    (large_gradient, 'activations and gradients are finite, but their norm overflows: that of'),
    (step.no_hook, 'run again, with the parameters as they are now, all is finite'),
  ],
)
def test_what_is_not_a_layers_fault(kind, hook, said, make_params, make_batch):
  model = build(kind)
  found = diagnose.make_diagnose(model, hook, 2)(make_params(model), carry_of(model, 4), make_batch(4), KEY)
  assert found.startswith(said), found
  assert ("it comes from the loss hook's term" in found) == (hook is large_gradient)


def test_a_gradient_goes_bad_where_the_backward_pass_meets_it_first(make_params, make_batch, monkeypatch):
  model = transformer.Transformer(transformer.TransformerConfig(dim=8, num_layers=3, num_heads=2), 11, 6)
  params = make_params(model)
  original = transformer.MLP.__call__

  def call(self, x_BTD):
    y_BTD = original(self, x_BTD)
    return y_BTD + jnp.sqrt(0.0 * jnp.abs(x_BTD)) if self.path[0] == 'block_1' else y_BTD

  monkeypatch.setattr(transformer.MLP, '__call__', call)
  said = diagnose.make_diagnose(model, step.no_hook, 1)(params, None, make_batch(4), KEY)
  assert said == 'activations and loss are finite; the gradient of block_1/mlp_norm/scale is not (the first in backward order)'


def test_a_target_past_the_vocabulary_is_a_loss_that_is_not_finite(make_params, make_batch):
  model, batch = build('transformer'), make_batch(4)
  batch.targets_BT[1, 2] = 11  # padding of the vocabulary
  said = finder('transformer')(make_params(model), None, batch, KEY)
  assert said == 'all activations are finite, and the loss of a token is not'


def test_nothing_is_changed_or_donated(make_params, make_batch):
  model = build('lstm')
  params, carry = make_params(model), carry_of(model, 4)
  before = jax.tree.map(np.array, (params, carry))
  find = finder('lstm')
  assert find(params, carry, make_batch(4), KEY) == find(params, carry, make_batch(4), KEY)
  for x, y in zip(jax.tree.leaves((params, carry)), jax.tree.leaves(before), strict=True):
    np.testing.assert_array_equal(x, y)
