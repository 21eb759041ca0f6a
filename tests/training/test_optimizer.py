import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from textgen_jax import errors, trees
from textgen_jax.models import build, lstm, transformer
from textgen_jax.training import muon, optimizer

MODELS = {
  'transformer': transformer.TransformerConfig(dim=16, num_layers=1, num_heads=2),
  'transformer, all parts': transformer.TransformerConfig(
    dim=16, num_layers=1, num_heads=2, position='learned', norm='layer', bias=True, activation='swiglu'
  ),
  'lstm': lstm.LSTMConfig(dim=16, num_layers=1),
  'lstm, untied': lstm.LSTMConfig(dim=16, num_layers=1, tied_embedding=False),
}


@pytest.mark.parametrize('name', list(MODELS))
def test_matrices_and_tables_decay_and_nothing_else(name):
  model = build.build(MODELS[name], 7, 8)
  params = jax.eval_shape(lambda: model.init(jax.random.PRNGKey(0), jnp.zeros((1, 2), jnp.int32), method='init_everything'))['params']
  params = jax.tree.map(lambda box: box.unbox(), params, is_leaf=lambda x: hasattr(x, 'unbox'))
  mask = dict(trees.named_leaves(optimizer.decay_mask(params)))
  assert mask == {leaf_name: len(leaf.shape) == 2 for leaf_name, leaf in trees.named_leaves(params)}
  assert set(mask.values()) == {True, False}


def test_a_parameter_without_a_rule_is_listed():
  params = {'block': {'kernel': jnp.ones((2, 2)), 'gate_temperature': jnp.ones(2)}, 'mixture': jnp.ones(3)}
  with pytest.raises(ValueError, match=r'weight decay.*block/gate_temperature, mixture$'):
    optimizer.decay_mask(params)


def config(**changes):
  settings = {'schedule': 'constant', 'warmup_steps': 0, 'schedule_steps': 10, 'weight_decay': 0.0, 'clip_norm': 0.0}
  return optimizer.OptimizerConfig(**(settings | changes))


def run(tx, params, gradients):
  state = tx.init(params)
  for gradient in gradients:
    updates, state = tx.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  return params


def adamw(params, gradients, c, rates, decays):
  """AdamW as in algorithm 2 of Loshchilov & Hutter 2019, in float64."""
  params = {name: np.asarray(x, np.float64) for name, x in params.items()}
  m = {name: np.zeros_like(x) for name, x in params.items()}
  v = {name: np.zeros_like(x) for name, x in params.items()}
  for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in gradient.values()))
    shrink = min(1.0, c.clip_norm / norm) if c.clip_norm else 1.0
    for name in params:
      g = np.asarray(gradient[name], np.float64) * shrink
      m[name] = c.b1 * m[name] + (1 - c.b1) * g
      v[name] = c.b2 * v[name] + (1 - c.b2) * g**2
      step = m[name] / (1 - c.b1**t) / (np.sqrt(v[name] / (1 - c.b2**t)) + c.eps)
      params[name] = params[name] - rate * (step + (c.weight_decay if decays[name] else 0) * params[name])
  return params


def test_adamw_by_hand():
  rng = np.random.default_rng(0)
  params = {'kernel': jnp.asarray(rng.standard_normal((3, 4))), 'bias': jnp.asarray(rng.standard_normal(4))}
  gradients = [{name: jnp.asarray(rng.standard_normal(x.shape) * 3) for name, x in params.items()} for _ in range(4)]
  c = config(peak_lr=0.1, final_lr=0.02, schedule='linear', schedule_steps=5, warmup_steps=1, weight_decay=0.3, clip_norm=2.0)
  c = dataclasses.replace(c, b1=0.8, b2=0.95, eps=1e-3)
  rates = [0.1, 0.1, 0.08, 0.06]  # one update of warm-up, then down to 0.02 in 4
  expected = adamw(params, gradients, c, rates, {'kernel': True, 'bias': False})
  found = run(optimizer.build(c), params, gradients)
  for name, x in expected.items():
    np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-6)


def test_decay_is_decoupled_from_the_gradient():
  # Without a gradient Adam's moments stay zero, and all that happens is w -> w * (1 - rate * decay).
  params = {'kernel': jnp.full((2, 2), 2.0), 'scale': jnp.full(2, 2.0)}
  zero = jax.tree.map(jnp.zeros_like, params)
  found = run(optimizer.build(config(peak_lr=0.5, weight_decay=0.2)), params, [zero, zero])
  np.testing.assert_allclose(found['kernel'], 2 * 0.9**2, rtol=1e-6)
  np.testing.assert_array_equal(found['scale'], 2.0)


def first_moment(clip_norm, gradient):
  tx = optimizer.build(config(clip_norm=clip_norm, b1=0.0))
  _, state = tx.update(gradient, tx.init(gradient), gradient)
  return optax.tree_utils.tree_get(state, 'mu')


def test_clip_is_by_the_norm_of_all_parameters_together():
  gradient = {'kernel': jnp.array([[3.0, 0.0]]), 'bias': jnp.array([4.0])}  # of norm 5
  for clip_norm, factor in ((1.0, 0.2), (2.5, 0.5), (5.1, 1.0), (0.0, 1.0)):
    clipped = first_moment(clip_norm, gradient)
    np.testing.assert_allclose(clipped['kernel'], [[3 * factor, 0]], rtol=1e-6)
    np.testing.assert_allclose(clipped['bias'], [4 * factor], rtol=1e-6)


NAN, INF = float('nan'), float('inf')


@pytest.mark.parametrize(
  ('field', 'value', 'constraint'),
  [
    *[(name, value, 'a finite number of at least 0')
      for name in ('peak_lr', 'final_lr', 'weight_decay', 'clip_norm', 'matrix_lr', 'embedding_lr_scale')
      for value in (NAN, INF, -1e-3)],
    *[('eps', value, 'a finite number above 0') for value in (NAN, INF, 0.0, -1e-8)],
    *[(name, value, r'in \[0, 1\)') for name in ('b1', 'b2', 'matrix_momentum', 'average_decay') for value in (NAN, 1.0, -0.1)],
    *[('decay_fraction', value, r'in \[0, 1\]') for value in (NAN, 1.5, -0.1)],
    *[(name, -1, 'at least 0') for name in ('warmup_steps', 'schedule_steps')],
  ],
)
def test_check_names_field_value_and_constraint(field, value, constraint):
  with pytest.raises(errors.UserError, match=rf'^optimizer\.{field}={value} is not {constraint}$'):
    optimizer.check(dataclasses.replace(optimizer.OptimizerConfig(), **{field: value}))


def test_check_of_the_schedule():
  with pytest.raises(errors.UserError, match=r"optimizer.schedule='cosin' is none of .*; did you mean 'cosine'\?"):
    optimizer.check(optimizer.OptimizerConfig(schedule='cosin'))
  optimizer.check(optimizer.OptimizerConfig(schedule='constant', schedule_steps=10, warmup_steps=100))
  optimizer.check(optimizer.OptimizerConfig(peak_lr=0.0, final_lr=0.0, weight_decay=0.0, clip_norm=0.0, b1=0.0, b2=0.0))


def shapes_of(name):
  model = build.build(MODELS[name], 7, 8)
  params = jax.eval_shape(lambda: model.init(jax.random.PRNGKey(0), jnp.zeros((1, 2), jnp.int32), method='init_everything'))['params']
  return jax.tree.map(lambda box: box.unbox(), params, is_leaf=lambda x: hasattr(x, 'unbox'))


@pytest.mark.parametrize('name', list(MODELS))
def test_every_parameter_has_a_group(name):
  found = dict(trees.named_leaves(optimizer.groups(shapes_of(name))))
  for leaf, group in found.items():
    if leaf.endswith('embedding'):
      assert group == 'embedding'
    elif 'unembedding' in leaf:
      assert group == 'unembedding'
    else:
      assert group == ('matrix' if leaf.endswith('kernel') else 'vector'), leaf


def some_params():
  rng = np.random.default_rng(0)
  shapes = {'block_0/up/kernel': (3, 4), 'embed/embedding': (5, 3), 'unembedding/kernel': (3, 5), 'final_norm/scale': (3,)}
  made = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
  gradients = [{name: jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for name, x in made.items()} for _ in range(3)]
  return made, gradients


def test_muon_takes_matrices_and_leaves_the_rest_to_adamw():
  params, gradients = some_params()
  c = config(kind='muon', peak_lr=0.01, matrix_lr=0.5, weight_decay=0.1)
  found = run(optimizer.build(c), params, gradients)
  expected = run(optimizer.build(dataclasses.replace(c, kind='adamw')), params, gradients)
  for name in ('embed/embedding', 'unembedding/kernel', 'final_norm/scale'):
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)
  ours = muon.scale_by_muon(c.matrix_momentum)
  kernel, state = params['block_0/up/kernel'], ours.init({'x': params['block_0/up/kernel']})
  for gradient in gradients:
    updates, state = ours.update({'x': gradient['block_0/up/kernel']}, state)
    kernel = kernel - 0.5 * (updates['x'] + 0.1 * kernel)
  np.testing.assert_allclose(found['block_0/up/kernel'], kernel, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kind', ['adamw', 'muon', 'lion', 'sgd'])
def test_rates_scale_by_group(kind):
  params, gradients = some_params()
  c = config(kind=kind, peak_lr=0.01)
  scaled = dataclasses.replace(c, embedding_lr_scale=3.0, unembedding_lr_scale=0.5, vector_lr_scale=0.0)
  one, other = (run(optimizer.build(how), params, gradients[:1]) for how in (c, scaled))
  for name, scale in (('block_0/up/kernel', 1), ('embed/embedding', 3), ('unembedding/kernel', 0.5), ('final_norm/scale', 0)):
    np.testing.assert_allclose(other[name] - params[name], scale * (one[name] - params[name]), rtol=1e-4, atol=1e-7)


def test_sgd_is_nesterov_s():
  params, gradients = some_params()
  found = run(optimizer.build(config(kind='sgd', peak_lr=0.1, b1=0.9, weight_decay=0.2)), params, gradients)
  for name, x in params.items():
    x, speed = np.asarray(x, np.float64), 0.0
    for gradient in gradients:
      g = gradient[name] + (0.0 if name.endswith('scale') else 0.2) * x
      speed = 0.9 * speed + g
      x = x - 0.1 * (g + 0.9 * speed)
    np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kind', list(optimizer.KINDS))
def test_every_kind_finds_the_bottom_of_a_bowl(kind):
  params, _ = some_params()
  target = jax.tree.map(lambda x: 0.5 * x + 0.1, params)

  def distance(at):
    return sum(jnp.square(x - y).sum() for x, y in zip(jax.tree.leaves(at), jax.tree.leaves(target), strict=True))

  c = config(kind=kind, peak_lr=0.02, final_lr=0.0, matrix_lr=0.02, schedule='linear', schedule_steps=200)
  tx, average = optimizer.build(c), optimizer.make_average(c)

  @jax.jit
  def update(params, averaged, state, count):
    updates, state = tx.update(jax.grad(distance)(params), state, params)
    params = optax.apply_updates(params, updates)
    return params, params if average is None else average(averaged, params, state, count), state

  averaged, state, first = params, tx.init(params), float(distance(params))
  for count in range(200):
    params, averaged, state = update(params, averaged, state, count)
  assert distance(averaged) < 0.02 * first


def test_schedule_free_averages_by_its_own_weights():
  # Defazio et al. 2024, with SGD's steps in AdamW's place taken from optax: x is the mean of z weighted by the squared rate.
  params, gradients = some_params()
  c = config(kind='schedule_free', peak_lr=0.1, b1=0.8)
  tx, average = optimizer.build(c), optimizer.make_average(c)
  state, y, zs = tx.init(params), params, []
  for gradient in gradients:
    updates, state = tx.update(gradient, state, y)
    y = optax.apply_updates(y, updates)
    zs.append(optimizer._free_state(state).z)
  found = average(None, y, state, jnp.int32(3))
  for name in params:
    np.testing.assert_allclose(found[name], np.mean([z[name] for z in zs], axis=0), rtol=1e-4, atol=1e-5)


def test_a_moving_average_by_hand():
  average = optimizer.make_average(config(average_decay=0.5))
  found = {'x': jnp.asarray([8.0])}
  for updates, value in enumerate([4.0, 2.0, 0.0]):
    found = average(found, {'x': jnp.asarray([value])}, None, jnp.int32(updates))
  a = 0.1 * 8 + 0.9 * 4  # keeps (1 + n) / (10 + n), at most a half
  b = 2 / 11 * a + 9 / 11 * 2
  np.testing.assert_allclose(found['x'], [3 / 12 * b], rtol=1e-6)
  assert optimizer.make_average(config()) is None


def test_check_of_kinds_and_averages():
  with pytest.raises(errors.UserError, match=r"optimizer.kind='adam' is none of .*; did you mean 'adamw'\?"):
    optimizer.check(optimizer.OptimizerConfig(kind='adam'))
  with pytest.raises(errors.UserError, match=r"optimizer.b1=0.0 is not above 0, which optimizer.kind='schedule_free' needs"):
    optimizer.check(optimizer.OptimizerConfig(kind='schedule_free', b1=0.0))
  with pytest.raises(errors.UserError, match=r"optimizer.average_decay=0.9: optimizer.kind='schedule_free' averages by itself"):
    optimizer.check(optimizer.OptimizerConfig(kind='schedule_free', average_decay=0.9))
