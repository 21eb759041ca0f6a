import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from textgen_jax import trees
from textgen_jax.data import tokens, windows
from textgen_jax.models import attention, build, lstm, transformer
from textgen_jax.training import health, losses, optimizer, step

no_rate = optax.constant_schedule(0.0)


@functools.cache
def plain_step(model, tx, accumulation_steps):
  return jax.jit(step.make_train_step(model, tx, no_rate, accumulation_steps))


def random_carry(model, rows, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), model.init_cache(rows, 0))


def assert_trees_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (name, x), (_, y) in zip(trees.named_leaves(a), trees.named_leaves(b), strict=True):
    np.testing.assert_array_equal(x, y, err_msg=name)


def assert_trees_close(a, b, rtol):
  """Each leaf's difference is below `rtol` of the leaf's norm."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (name, x), (_, y) in zip(trees.named_leaves(a), trees.named_leaves(b), strict=True):
    difference = np.linalg.norm(np.asarray(x, np.float64) - np.asarray(y, np.float64))
    assert difference <= rtol * np.linalg.norm(y), f'{name}: {difference / np.linalg.norm(y)}'


def weighing_hook(inputs):
  """A metric whose weight differs between micro-batches."""
  correct_BT = (inputs.unembed(inputs.hidden_BTD).argmax(-1) == inputs.batch.targets_BT) * inputs.batch.weights_BT
  return 0.1 * (jnp.square(inputs.hidden_BTD).sum(-1) * inputs.batch.weights_BT).sum(), {
    'accuracy': (correct_BT.sum(), inputs.batch.weights_BT.sum())
  }


def test_accumulation_equals_the_large_batch(model, make_params, make_batch, make_state, recorder):
  rows = 8
  batch = make_batch(rows, starts=model.window is None)
  batch.weights_BT[::4] *= 0.01  # so that micro-batches differ in how much they weigh
  old = make_state(make_params(model), recorder, random_carry(model, rows) if model.window is None else None)
  whole, whole_sums = jax.jit(step.make_train_step(model, recorder, no_rate, 1, weighing_hook))(old, batch)
  assert set(whole_sums) == {'loss', 'accuracy', 'grad_norm', 'learning_rate', 'skipped_steps', 'spiked_steps', 'skipped_in_a_row'}
  np.testing.assert_allclose(whole_sums['loss'][1], batch.weights_BT.sum())
  for accumulation_steps in (2, 4):
    parts, parts_sums = jax.jit(step.make_train_step(model, recorder, no_rate, accumulation_steps, weighing_hook))(old, batch)
    assert_trees_close(parts.opt_state, whole.opt_state, 1e-6)
    assert_trees_close(parts.carry, whole.carry, 1e-6)
    for name, sums in whole_sums.items():
      np.testing.assert_allclose(parts_sums[name], sums, rtol=1e-6, err_msg=name)


def test_logits_in_chunks_make_the_same_step(make_model, make_params, make_batch, make_state, recorder, monkeypatch):
  model = make_model('transformer')
  batch, old = make_batch(4), make_state(make_params(model), recorder)
  whole, whole_sums = plain_step(model, recorder, 1)(old, batch)
  monkeypatch.setattr(losses, 'MOST_LOGITS_BYTES_ON_CPU', 4 * 2 * 4 * 12)  # four tokens of two rows: not a divisor of six
  lowered = jax.jit(step.make_train_step(model, recorder, no_rate, 2)).lower(old, batch)
  assert lowered.as_text().count('stablehlo.while') == 2  # over micro-batches, and over chunks
  parts, sums = lowered.compile()(old, batch)
  assert_trees_close(parts.opt_state, whole.opt_state, 1e-5)
  for name, expected in whole_sums.items():
    np.testing.assert_allclose(sums[name], expected, rtol=1e-5, err_msg=name)


def test_the_gradient_is_that_of_the_weighted_mean(model, make_params, make_batch, make_state, recorder):
  batch, params = make_batch(4), make_params(model)
  old = make_state(params, recorder)
  new, sums = plain_step(model, recorder, 2)(old, batch)

  def mean(params):
    logits_BTV = model.apply({'params': params}, model.apply({'params': params}, batch.tokens_BT)[0], method='unembed')
    log_p_BTV = jax.nn.log_softmax(logits_BTV[..., : model.vocab_size])
    targets_BTV = jax.nn.one_hot(batch.targets_BT, model.vocab_size)
    return -(log_p_BTV * targets_BTV * batch.weights_BT[..., None]).sum() / batch.weights_BT.sum()

  loss, expected = jax.jit(jax.value_and_grad(mean))(params)
  assert_trees_close(new.opt_state, expected, 1e-5)
  np.testing.assert_allclose(sums['loss'][0] / sums['loss'][1], loss, rtol=1e-6)
  np.testing.assert_allclose(sums['grad_norm'][0], optax.tree.norm(expected), rtol=1e-5)


BAD = 7


def constant_nan(inputs):
  return jnp.where((inputs.batch.tokens_BT == BAD).any(), jnp.nan, 0.0), {}


def infinite_gradient(inputs):
  weight = jnp.where((inputs.batch.tokens_BT == BAD).any(), jnp.inf, 0.0)
  return weight * jnp.square(inputs.hidden_BTD).sum(), {}


def huge_gradient(inputs):
  """A finite term of a finite gradient, 1e30, whose squares overflow."""
  bad = (inputs.batch.tokens_BT == BAD).any()
  change = inputs.hidden_BTD - jax.lax.stop_gradient(inputs.hidden_BTD)
  return jnp.where(bad, 1e30, 0.0) * change.sum(), {}


def gradient_alone(inputs):
  """A finite term, whose gradient isn't: the root's at 0."""
  bad = (inputs.batch.tokens_BT == BAD).any()
  return jnp.sqrt(jnp.where(bad, 0.0, 1.0) * jnp.abs(inputs.hidden_BTD.sum())), {}


@pytest.mark.parametrize(
  ('hook', 'accumulation_steps'),
  [(constant_nan, 1), (constant_nan, 2), (infinite_gradient, 2), (gradient_alone, 1), (huge_gradient, 1), (huge_gradient, 2)],
)
def test_a_step_that_is_not_finite_changes_nothing_but_the_step(
  hook, accumulation_steps, model, make_params, make_batch, make_state
):
  config = optimizer.OptimizerConfig(peak_lr=0.1, warmup_steps=8, schedule_steps=20)
  tx, schedule = optimizer.build(config), optimizer.make_schedule(config)
  train_step = jax.jit(step.make_train_step(model, tx, schedule, accumulation_steps, hook))
  clean = [batch._replace(tokens_BT=np.where(batch.tokens_BT == BAD, 0, batch.tokens_BT)) for batch in map(make_batch, (4, 4, 4))]
  bad = clean[1]._replace(tokens_BT=clean[1].tokens_BT.copy())
  bad.tokens_BT[1, 2] = BAD
  carry = random_carry(model, 4) if model.window is None else None
  before, _ = train_step(make_state(make_params(model), tx, carry), clean[0])
  after, sums = train_step(before, bad)
  for field in ('params', 'opt_state', 'carry', 'updates', 'root_key', 'data_offset'):
    assert_trees_equal(getattr(after, field), getattr(before, field))
  assert_trees_equal(after.health, dataclasses.replace(before.health, skipped_in_a_row=jnp.int32(1)))
  assert (before.step, after.step) == (1, 2)
  assert not np.isfinite(sums['grad_norm'][0]) or hook is constant_nan
  assert [sums[name][0] for name in step.COUNTS] == [1, 0, 1]
  again, sums = train_step(after, bad)
  assert_trees_equal(again.params, before.params)
  assert [sums[name][0] for name in step.COUNTS] == [2, 0, 2]
  # It goes on: the next update is the second of the warm-up, with finite numbers everywhere.
  last, sums = train_step(after, clean[2])
  assert (last.step, last.updates) == (3, 2)
  assert [sums[name][0] for name in step.COUNTS] == [1, 0, 0]
  np.testing.assert_allclose(sums['learning_rate'][0], 0.1 * 2 / 8, rtol=1e-6)
  assert all(np.isfinite(leaf).all() for _, leaf in trees.named_leaves(last))
  assert all((x != y).any() for (_, x), (_, y) in zip(*map(trees.named_leaves, (last.params, after.params)), strict=True))


def test_a_spike_is_skipped_where_it_is_asked_for(model, make_params, make_batch, make_state):
  config = optimizer.OptimizerConfig(peak_lr=0.1, warmup_steps=8, schedule_steps=20)
  tx = optimizer.build(config)
  heeding, heedless = (jax.jit(step.make_train_step(model, tx, no_rate, 2, spike_deviations=deviations)) for deviations in (3.0, np.inf))
  carry = random_carry(model, 4) if model.window is None else None
  old = make_state(make_params(model), tx, carry)
  plain, sums = heedless(old, make_batch(4))
  loss = sums['loss'][0] / sums['loss'][1]
  assert_trees_equal(heeding(old, make_batch(4))[0].params, plain.params)  # there were too few losses to know
  np.testing.assert_allclose(plain.health.loss_mean, loss, rtol=1e-6)
  for deviation, skipped in ((0.31, True), (0.35, False)):  # of which the loss stands 1 above the mean
    seen = health.fresh().replace(loss_mean=loss - 1, loss_variance=jnp.float32(deviation**2), losses=jnp.int32(99))
    before = dataclasses.replace(old, health=seen)
    after, sums = heeding(before, make_batch(4))
    assert [sums[name][0] for name in step.COUNTS] == [0, skipped, skipped]
    if skipped:
      assert_trees_equal(after, dataclasses.replace(before, step=after.step, health=after.health))
      assert_trees_equal(after.health, seen.replace(spiked_steps=jnp.int32(1), skipped_in_a_row=jnp.int32(1)))
    else:
      assert_trees_equal(after.params, plain.params)
      assert after.health.losses == 100
    assert_trees_equal(heedless(before, make_batch(4))[0].params, plain.params)


def test_a_batch_without_weight_is_no_division_by_zero(model, make_params, make_batch, make_state, recorder):
  batch = make_batch(4)
  batch.weights_BT[:] = 0
  old = make_state(make_params(model), recorder)
  new, _ = plain_step(model, recorder, 1)(old, batch)
  assert_trees_equal(new.params, old.params)
  assert (new.updates, new.health.losses) == (1, 0)  # nor a loss of 0


def test_micro_batches_outside_of_the_step_are_those_within(model, make_params, make_batch, make_state):
  """The same rows, carries and keys: dropout and the hook draw the same."""
  drawn = []

  def hook(inputs):
    term = (jax.random.uniform(inputs.key) * inputs.nll_BT * inputs.batch.weights_BT).sum()
    return term, {'term': (term, jnp.ones(()))}

  old = make_state(make_params(model), optax.sgd(0.0), random_carry(model, 6) if model.window is None else None)
  _, sums = jax.jit(step.make_train_step(model, optax.sgd(0.0), no_rate, 3, hook))(old, make_batch(6))
  for batch, carry, key in step.each_micro_batch(3, make_batch(6), old.carry, jax.random.fold_in(old.root_key, old.step)):
    drawn.append(step.loss_terms(model, hook, old.params, carry, batch, key))
  np.testing.assert_allclose(sum(terms.extra for terms in drawn), sums['term'][0], rtol=1e-5)
  np.testing.assert_allclose(sum(terms.loss for terms in drawn), sums['loss'][0], rtol=1e-5)


def test_a_hook_adds_a_hand_worked_gradient(model, make_params, make_batch, make_state, recorder):
  # d/dE of sum(E**2) is 2 E, and all gradients are divided by the batch's weight.
  def hook(inputs):
    squares = jnp.square(inputs.params['embed']['embedding']).sum()
    return squares, {'squares': (squares, jnp.ones(()))}

  batch, old = make_batch(4), make_state(make_params(model), recorder)
  plain, plain_sums = plain_step(model, recorder, 1)(old, batch)
  hooked, sums = jax.jit(step.make_train_step(model, recorder, no_rate, 1, hook))(old, batch)
  table = np.asarray(old.params['embed']['embedding'])
  difference = jax.tree.map(jnp.subtract, hooked.opt_state, plain.opt_state)
  np.testing.assert_allclose(difference['embed']['embedding'], 2 * table / batch.weights_BT.sum(), rtol=1e-4, atol=1e-6)
  others = [np.abs(x).max() for name, x in trees.named_leaves(difference) if name != 'embed/embedding']
  assert max(others) < 1e-6
  np.testing.assert_allclose(sums['squares'], [(table**2).sum(), 1.0], rtol=1e-6)
  np.testing.assert_allclose(sums['loss'], plain_sums['loss'], rtol=1e-6)  # the hook's term stays out of the loss


def test_a_z_loss_through_the_hook(model, make_params, make_batch, make_state, recorder):
  def hook(inputs):
    z_BT = jax.nn.logsumexp(inputs.unembed(inputs.hidden_BTD), axis=-1)
    z_loss = (jnp.square(z_BT) * inputs.batch.weights_BT).sum()
    return 0.5 * z_loss, {'z_loss': (z_loss, inputs.batch.weights_BT.sum())}

  batch, params = make_batch(4), make_params(model)
  old = make_state(params, recorder)
  plain, _ = plain_step(model, recorder, 2)(old, batch)
  hooked, sums = jax.jit(step.make_train_step(model, recorder, no_rate, 2, hook))(old, batch)
  hidden_BTD, logits_BTV = forward(model, params, batch.tokens_BT)
  # d/dW of 0.5 z**2 is the outer product of hidden and z * softmax(logits).
  z_BT1 = np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
  pull_BTV = z_BT1 * np.exp(logits_BTV - z_BT1) * batch.weights_BT[..., None] / batch.weights_BT.sum()
  expected_DV = np.einsum('BTD,BTV->DV', hidden_BTD, pull_BTV)
  found_DV = np.asarray(hooked.opt_state['unembedding']['kernel'] - plain.opt_state['unembedding']['kernel'])
  np.testing.assert_allclose(found_DV[:, : model.vocab_size], expected_DV, rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(found_DV[:, model.vocab_size :], 0)
  np.testing.assert_allclose(sums['z_loss'][0], (z_BT1[..., 0] ** 2 * batch.weights_BT).sum(), rtol=1e-5)


def forward(model, params, tokens_BT):
  """Hidden and logits (without padding) in float64."""
  hidden_BTD, _ = jax.jit(model.apply)({'params': params}, tokens_BT)
  logits_BTV = jax.jit(functools.partial(model.apply, method='unembed'))({'params': params}, hidden_BTD)
  return np.asarray(hidden_BTD, np.float64), np.asarray(logits_BTV, np.float64)[..., : model.vocab_size]


class EntropyAttention(attention.Attention):
  """Sows how widely each query looks."""

  def collect(self, p_BHTS, v_BSGK, deterministic):
    self.sow('intermediates', 'entropy_BHT', -jax.scipy.special.xlogy(p_BHTS, p_BHTS).sum(-1))
    return super().collect(p_BHTS, v_BSGK, deterministic)


@pytest.mark.parametrize(('remat', 'scan_layers'), [('full', False), ('none', True), ('full', True)])
def test_what_a_module_sows_reaches_the_hook(remat, scan_layers, make_params, make_batch, make_state, recorder):
  config = transformer.TransformerConfig(dim=16, num_layers=2, num_heads=2, remat=remat, scan_layers=scan_layers)
  model = transformer.Transformer(config, 11, 6, EntropyAttention)
  seen: dict[str, Any] = {}

  def hook(inputs):
    entropies = {name: x for name, x in trees.named_leaves(inputs.sown) if 'entropy' in name}
    seen.update({name: x.shape for name, x in entropies.items()})
    total = sum(x.sum() for x in entropies.values())
    return total, {'entropy': (total, jnp.asarray(float(sum(x.size for x in entropies.values()))))}

  batch, params = make_batch(4), make_params(model)
  old = make_state(params, recorder)
  plain, _ = plain_step(model, recorder, 2)(old, batch)
  hooked, sums = jax.jit(step.make_train_step(model, recorder, no_rate, 2, hook))(old, batch)
  assert set(seen.values()) == {(2, 2, 6)}  # of a micro-batch
  assert sorted(name.split('/')[0] for name in seen) == ['block_0', 'block_1']
  _, sown = jax.jit(functools.partial(model.apply, mutable=['intermediates']))({'params': params}, batch.tokens_BT)
  expected = sum(np.asarray(x).sum() for x in jax.tree.leaves(sown))
  np.testing.assert_allclose(sums['entropy'], [expected, 4 * 2 * 6 * 2], rtol=1e-5)
  query = ('block_0', 'attention', 'query', 'kernel')
  changes = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), hooked.params, plain.params)
  for key in query:
    changes = changes[key]
  assert changes > 1e-3  # the term has a gradient


@pytest.mark.parametrize('accumulation_steps', [2, 4])
def test_sown_losses_join_the_objective_and_not_the_loss(accumulation_steps, make_params, make_batch, make_state, recorder):
  """Weighted as tokens are; with accumulation as in the large batch."""
  config = lstm.LSTMConfig(dim=16, num_layers=2, activation_penalty=2.0, temporal_penalty=3.0)
  model, plain = (build.build(c, 11, 6) for c in (config, dataclasses.replace(config, activation_penalty=0.0, temporal_penalty=0.0)))
  batch, params = make_batch(8), make_params(model)
  batch.weights_BT[::4] *= 0.01  # so that micro-batches differ in how much they weigh
  old = make_state(params, recorder)
  whole, whole_sums = plain_step(model, recorder, 1)(old, batch)
  parts, parts_sums = plain_step(model, recorder, accumulation_steps)(old, batch)
  assert_trees_close(parts.opt_state, whole.opt_state, 1e-6)
  without, without_sums = plain_step(plain, recorder, 1)(old, batch)
  assert set(whole_sums) == set(without_sums)
  for sums in (parts_sums, without_sums):
    np.testing.assert_allclose(sums['loss'], whole_sums['loss'], rtol=1e-6)

  def penalty(params):
    hidden_BTD = model.apply({'params': params}, batch.tokens_BT)[0]
    change_BT = jnp.pad(jnp.square(jnp.diff(hidden_BTD, axis=1)).mean(-1), ((0, 0), (1, 0))) * 6 / 5
    loss_BT = 2 * jnp.square(hidden_BTD).mean(-1) + 3 * change_BT
    return (loss_BT * batch.weights_BT).sum() / batch.weights_BT.sum()

  expected = jax.tree.map(jnp.add, without.opt_state, jax.jit(jax.grad(penalty))(params))
  assert_trees_close(whole.opt_state, expected, 1e-5)
  difference = jax.tree.map(jnp.subtract, whole.opt_state, without.opt_state)
  assert optax.tree.norm(difference) > 1e-2


def test_the_hook_gets_a_key_of_its_own(make_model, make_params, make_batch, make_state, recorder):
  def hook(inputs):
    return jnp.zeros(()), {'draw': (jax.random.uniform(inputs.key), jnp.ones(()))}

  model, batch = make_model('lstm'), make_batch(4)
  once = jax.jit(step.make_train_step(model, recorder, no_rate, 1, hook))
  twice = jax.jit(step.make_train_step(model, recorder, no_rate, 2, hook))
  old = make_state(make_params(model), recorder)
  draws = [float(once(dataclasses.replace(old, step=jnp.int32(n)), batch)[1]['draw'][0]) for n in (0, 1, 0)]
  assert draws[0] == draws[2] != draws[1]
  total, weight = twice(old, batch)[1]['draw']
  assert weight == 2
  assert float(total) != pytest.approx(2 * draws[0])  # another key for the second micro-batch


def test_dropout_is_drawn_anew_each_step_and_again_for_the_same_one(make_batch, make_params, make_state, recorder):
  model = transformer.Transformer(transformer.TransformerConfig(dim=16, num_layers=1, num_heads=2, dropout=0.5), 11, 6)
  batch, old = make_batch(4), make_state(make_params(model), recorder)
  train_step = plain_step(model, recorder, 1)
  found = [float(train_step(dataclasses.replace(old, step=jnp.int32(n)), batch)[1]['loss'][0]) for n in (0, 1, 0)]
  assert found[0] == found[2] != found[1]


def test_the_rate_that_is_logged_is_the_one_that_is_applied(make_model, make_params, make_batch, make_state):
  model, batch = make_model('lstm'), make_batch(3)
  schedule = optax.linear_schedule(0.4, 0.0, 4)
  tx = optax.sgd(schedule)
  train_step = jax.jit(step.make_train_step(model, tx, schedule, 1))
  state = make_state(make_params(model), tx)
  for rate in (0.4, 0.3, 0.2, 0.1, 0.0):
    new, sums = train_step(state, batch)
    np.testing.assert_allclose(sums['learning_rate'][0], rate, atol=1e-7)
    change = jax.tree.map(jnp.subtract, new.params, state.params)
    np.testing.assert_allclose(optax.tree.norm(change), rate * sums['grad_norm'][0], rtol=1e-4, atol=1e-6)
    state = new


def test_streams_with_a_carry_are_one_long_text(make_model, make_params, make_state):
  model, rows, length = make_model('lstm'), 3, 5
  text = np.random.default_rng(0).integers(0, 11, 3 * 31)
  split = tokens.Split(text, np.zeros(0, tokens.DOCUMENT), (tokens.Range(0, len(text), 1.0),))
  data = windows.ContiguousStreams(split, 0, rows, length)
  assert data.steps_per_epoch == [5]
  still = optax.sgd(0.0)
  train_step = jax.jit(step.make_train_step(model, still, no_rate, 1))
  params = make_params(model)
  state = make_state(params, still, model.init_cache(rows, 0))
  batches = [data.batch(n) for n in range(10)]
  found = []
  for batch in batches:
    state, sums = train_step(state, batch)
    found.append(float(sums['loss'][0]))
  for epoch in (batches[:5], batches[5:]):  # the second one starts from nothing again
    tokens_BT, targets_BT = (np.concatenate([getattr(batch, name) for batch in epoch], axis=1) for name in ('tokens_BT', 'targets_BT'))
    _, logits_BTV = forward(model, params, tokens_BT)
    expected = np.asarray(losses.nll(jnp.asarray(logits_BTV), targets_BT)).reshape(rows, 5, length).sum(axis=(0, 2))
    np.testing.assert_allclose(found[:5], expected, rtol=1e-5)
    del found[:5]


def only_window(text, end_of_text=None):
  """All of a text as one row."""
  split = tokens.Split(np.array(text, np.uint8), np.zeros(0, tokens.DOCUMENT), (tokens.Range(0, len(text), 1.0),))
  return windows.RandomWindows(split, 0, 1, len(text) - 1, end_of_text).batch(0)


def test_documents_in_one_row_are_learned_as_if_alone(model, make_params, make_state, recorder):
  end, (first, second) = 10, ([3, 1, 4, 1, 5], [9, 2, 6])
  old = make_state(make_params(model), recorder)
  train_step = plain_step(model, recorder, 1)

  def learn(text, end_of_text=None):
    """The summed loss and its gradient."""
    new, sums = train_step(old, only_window(text, end_of_text))
    total, weight = map(float, sums['loss'])
    assert weight == len(text) - 1
    return total, jax.tree.map(lambda x: x * weight, new.opt_state)

  row = [end, *first, end, *second, end]
  together, gradient = learn(row, end)
  (a, gradient_a), (b, gradient_b) = learn([end, *first, end]), learn([end, *second, end])
  np.testing.assert_allclose(together, a + b, rtol=1e-6)
  assert_trees_close(gradient, jax.tree.map(jnp.add, gradient_a, gradient_b), 1e-5)
  assert learn(row)[0] != pytest.approx(a + b, rel=1e-3)  # else the second sees the first


def test_streams_that_carry_know_where_documents_start(make_model, make_params, make_state):
  # A row of streams goes on over several steps: what a document's beginning left in the carry reaches its end, and no further.
  model, end, length = make_model('lstm'), 10, 4
  text = np.random.default_rng(3).integers(0, 10, 37).astype(np.uint8)
  text[[0, 7, 9, 18, 30, 36]] = end
  split = tokens.Split(text, np.zeros(0, tokens.DOCUMENT), (tokens.Range(0, len(text), 1.0),))
  data = windows.ContiguousStreams(split, 0, 1, length, end)
  still, params = optax.sgd(0.0), make_params(model)
  train_step = jax.jit(step.make_train_step(model, still, no_rate, 1))
  state, found, batches = make_state(params, still, model.init_cache(1, 0)), [], []
  for n in range(data.steps_per_epoch[0]):
    batches.append(data.batch(n))
    state, sums = train_step(state, batches[-1])
    found.append(float(sums['loss'][0]))
  read, targets = (np.concatenate([getattr(batch, name)[0] for batch in batches]) for name in ('tokens_BT', 'targets_BT'))
  starts = [0, *np.flatnonzero(read == end), len(read)]
  expected = []
  for start, stop in itertools.pairwise(starts):
    if start < stop:
      _, logits_BTV = forward(model, params, read[None, start:stop])
      expected += np.asarray(losses.nll(jnp.asarray(logits_BTV), targets[None, start:stop]))[0].tolist()
  np.testing.assert_allclose(found, np.reshape(expected, (-1, length)).sum(axis=1), rtol=1e-5)


@pytest.mark.parametrize('kind', ['adamw', 'schedule_free'])
def test_an_average_is_scored_and_what_it_is_of_is_trained(kind, make_model, make_params, make_batch, make_state):
  model, batch = make_model('lstm'), make_batch(3)
  how = optimizer.OptimizerConfig(kind=kind, schedule='constant', warmup_steps=0, schedule_steps=10, peak_lr=0.05)
  how.average_decay = 0.5 if kind == 'adamw' else 0.0
  tx, average = optimizer.build(how), optimizer.make_average(how)
  params = make_params(model)
  plain, kept = make_state(params, tx), dataclasses.replace(make_state(params, tx), trained=params)
  without = jax.jit(step.make_train_step(model, tx, no_rate, 1))
  with_ = jax.jit(step.make_train_step(model, tx, no_rate, 1, average=average))
  expected = params
  for n in range(3):
    plain, sums = without(plain, batch)
    kept, kept_sums = with_(kept, batch)
    assert_trees_equal(sums, kept_sums)  # the loss is of what is trained
    assert_trees_equal(kept.trained, plain.params)
    expected = average(expected, plain.params, plain.opt_state, jnp.int32(n))
    assert_trees_close(kept.params, expected, 1e-6)
  assert optax.tree.norm(jax.tree.map(jnp.subtract, kept.params, kept.trained)) > 1e-3
  bad = batch._replace(weights_BT=batch.weights_BT * np.float32(np.nan))
  skipped, _ = with_(kept, bad)
  assert_trees_equal((skipped.params, skipped.trained), (kept.params, kept.trained))


def test_dispatches_are_their_steps_in_turn_wherever_they_are_cut(make_model, make_params, make_batch, make_state):
  """With the carry, the optimizer's state and what is skipped. Alone they are a program of their own, and round otherwise."""
  model, rows = make_model('lstm'), 4

  def hook(inputs):
    return jnp.where((inputs.batch.tokens_BT == BAD).all(), jnp.nan, 0.0), {}

  config = optimizer.OptimizerConfig(peak_lr=0.1, warmup_steps=2, schedule_steps=20)
  train_step = step.make_train_step(model, optimizer.build(config), optimizer.make_schedule(config), 1, hook)
  batches = [make_batch(rows, seed=n, starts=True) for n in range(6)]
  batches[1] = batches[1]._replace(tokens_BT=np.full_like(batches[1].tokens_BT, BAD))
  alone, dispatch = jax.jit(train_step), jax.jit(step.make_dispatch(train_step, 3))

  def train(*counts):
    state, sums, left = make_state(make_params(model), optimizer.build(config), random_carry(model, rows)), [], batches
    for count in counts:
      room = [*left[:count], *[left[0]] * (3 - count)]
      state, stacked = dispatch(state, jax.tree.map(lambda *leaves: np.stack(leaves), *room), np.int32(count))
      sums, left = sums + step.each(stacked, count), left[count:]
    return state, sums

  full, full_sums = train(3, 3)
  assert_trees_equal(train(1, 2, 3), (full, full_sums))
  state = make_state(make_params(model), optimizer.build(config), random_carry(model, rows))
  for batch, found in zip(batches, full_sums, strict=True):
    state, sums = alone(state, batch)
    (sums,) = step.each(sums, 1)
    assert set(sums) == set(found)
    for name, pair in sums.items():
      np.testing.assert_allclose(found[name], pair, rtol=1e-5, err_msg=name)
  assert (full.step, full.updates) == (state.step, state.updates) == (6, 5)  # one was skipped
  assert_trees_close((full.params, full.carry), (state.params, state.carry), 1e-5)


def test_spans_end_where_something_is_due_and_cover_all_steps():
  never, fifths = (lambda done: False), (lambda done: done % 5 == 0)
  assert list(step.spans(3, 12, 1, never)) == [range(n, n + 1) for n in range(4, 13)]
  assert list(step.spans(3, 12, 4, never)) == [range(4, 8), range(8, 12), range(12, 13)]
  assert list(step.spans(3, 17, 4, fifths)) == [range(4, 6), range(6, 10), range(10, 11), range(11, 15), range(15, 16), range(16, 18)]
  assert list(step.spans(0, 3, 50, never)) == [range(1, 4)]
  assert list(step.spans(7, 7, 4, never)) == []


TRANSFORMERS = [
  transformer.TransformerConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, activation='swiglu', tied_embedding=True),
  transformer.TransformerConfig(dim=32, num_layers=2, num_heads=2, position='learned', norm='layer', activation='gelu', bias=True),
  transformer.TransformerConfig(dim=32, num_layers=2, num_heads=2, init='gpt2', remat='full', scan_layers=True),
]
LSTMS = [lstm.LSTMConfig(dim=32, num_layers=2), lstm.LSTMConfig(dim=32, num_layers=1, tied_embedding=False, weight_dropout=0.1)]


@pytest.fixture
def steps_of(make_model, make_params, make_batch, make_state):
  """The state before, and after one step with products of float32 and of bfloat16."""

  def steps(config, tx, accumulation_steps):
    plain = make_model('transformer')
    model = build.build(config, plain.vocab_size, plain.context_length)
    old, batch = make_state(make_params(model), tx), make_batch(4)
    found = [old]
    for dtype in ('float32', 'bfloat16'):
      take = step.make_train_step(model, tx, no_rate, accumulation_steps, product_dtype=dtype)
      found.append(jax.jit(take)(old, batch)[0])
    return found

  return steps


@pytest.mark.parametrize('config', [*TRANSFORMERS, *LSTMS])
def test_products_of_bfloat16_change_a_step_by_rounding(config, steps_of, recorder):
  _, plain, rounded = (state.opt_state for state in steps_of(config, recorder, 2))
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(rounded))
  assert_trees_close(rounded, plain, rtol=0.05)
  assert any((np.asarray(x) != np.asarray(y)).any() for x, y in zip(*map(jax.tree.leaves, (plain, rounded)), strict=True))


@pytest.mark.parametrize('config', [TRANSFORMERS[0], LSTMS[0]])
def test_muon_takes_gradients_of_bfloat16(config, steps_of):
  """It transposes tall matrices, which XLA may do to their gradients' products; what it makes orthogonal has no small parts."""
  tx = optimizer.build(optimizer.OptimizerConfig(kind='muon', schedule_steps=10, warmup_steps=0, weight_decay=0.0))
  old, plain, rounded = steps_of(config, tx, 1)
  before, plain, rounded = (dict(trees.named_leaves(state.params)) for state in (old, plain, rounded))
  matrices = [name for name, x in before.items() if x.ndim == 2 and name.startswith(('block_', 'layer_'))]
  updates = [{name: after[name] - before[name] for name in matrices} for after in (plain, rounded)]
  assert updates[0]
  assert min(np.abs(x).max() for x in updates[0].values()) > 1e-4
  assert_trees_close(*updates, rtol=0.2)
