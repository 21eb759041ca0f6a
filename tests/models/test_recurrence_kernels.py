"""The GPU's loop in Pallas's interpreter, beside `recurrence.recur`; and where it is taken."""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from textgen_jax import axes, errors
from textgen_jax.models import build, lstm, recurrence, recurrence_kernels

T, B, D = 21, 8, 16  # more times than one launch takes

quick_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


@pytest.fixture(autouse=True)
def several_programs(monkeypatch):
  """Each works on four rows and eight columns of the eight and sixteen."""
  monkeypatch.setattr(recurrence_kernels, 'TILE', 32)
  monkeypatch.setattr(recurrence_kernels, 'MOST_COLUMNS', 8)


def inputs(dtype='float32'):
  rng = np.random.default_rng(0)

  def normal(*shape, scale=1.0):
    return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)

  args = normal(T, B, 4 * D).astype(dtype), normal(4 * D), normal(D, 4 * D, scale=0.5).astype(dtype)
  return *args, (normal(B, D), normal(B, D))


def masks(kept, starts):
  rng = np.random.default_rng(1)
  keep_BD = jnp.asarray(rng.choice([0.0, 2.0], size=(B, D)), jnp.float32) if kept else None
  starts_TB = rng.random((T, B)) < 0.2
  starts_TB[0, 1] = starts_TB[-1, 2] = True
  return keep_BD, jnp.asarray(starts_TB) if starts else None


def total_and_slopes(loop, args):
  """Every output counts, each by weights of its own."""
  weights = np.random.default_rng(2).normal(size=(T + 2, B, D))

  def total(args):
    hidden_TBD, (hidden_BD, cell_BD) = outputs = loop(*args)
    return jnp.vdot(jnp.concatenate([hidden_TBD.astype(jnp.float32), hidden_BD[None], cell_BD[None]]), weights), outputs

  slopes, outputs = jax.grad(total, has_aux=True)(args)
  return outputs, slopes


@pytest.mark.parametrize('kinds', [*itertools.product([False, True], repeat=2)], ids=str)
def test_outputs_carry_and_every_gradient_are_those_of_the_plain_loop(kinds):
  args, (keep_BD, starts_TB) = inputs(), masks(*kinds)

  @quick_jit
  def both(args):
    found = total_and_slopes(lambda *args: recurrence_kernels.recur(*args, keep_BD, starts_TB, True), args)
    return found, total_and_slopes(lambda *args: recurrence.recur(*args, keep_BD, None, starts_TB), args)

  found, expected = both(args)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6 * np.abs(y).max()), found, expected)
  assert all(np.abs(x).max() > 0.01 for x in jax.tree.leaves(expected))


def test_gradients_in_bfloat16_are_near_and_in_the_arguments_types():
  args, (keep_BD, starts_TB) = inputs('bfloat16'), masks(True, True)

  @quick_jit
  def both(args):
    found = total_and_slopes(lambda *args: recurrence_kernels.recur(*args, keep_BD, starts_TB, True), args)
    return found, total_and_slopes(lambda *args: recurrence.recur(*args, keep_BD, None, starts_TB), args)

  (_, slopes), (_, expected) = both(args)
  assert [x.dtype for x in jax.tree.leaves(slopes)] == [x.dtype for x in jax.tree.leaves(args)]
  slopes, expected = jax.tree.map(lambda x: x.astype(jnp.float32), (slopes, expected))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=0.01 * np.abs(y).max()), slopes, expected)


class Mesh:
  """A constrain of so many devices, which splits nothing."""

  def __init__(self, row_ways):
    self.row_ways = row_ways

  def ways(self, name):
    return self.row_ways if name == axes.BATCH else 1


def no_mesh(x, names):
  del names
  return x


class FakeDevice:
  device_kind = 'one of the test'

  def __init__(self, platform_version, compute_capability='9.0'):
    self.client, self.platform_version, self.compute_capability = self, platform_version, compute_capability


def on(monkeypatch, backend, device, devices):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  monkeypatch.setattr(jax, 'local_devices', lambda: [FakeDevice(*device)])
  monkeypatch.setattr(jax, 'device_count', lambda: devices)


CUDA = 'PJRT C API\ncuda 13000'
SHAPE, NVIDIA, T4, AMD = (128, 128, 4 * 1024), ('gpu', (CUDA,)), ('gpu', (CUDA, '7.5')), ('gpu', ('PJRT C API\nrocm 70000',))
OLD = 'it needs an NVIDIA GPU of compute capability 8.0 or more, and this is one of the test'


@pytest.mark.parametrize(
  ('backend', 'devices', 'shape', 'valid', 'constrain', 'obstacle'),
  [
    (NVIDIA, 1, SHAPE, None, no_mesh, ''),
    (NVIDIA, 4, SHAPE, None, Mesh(4), ''),
    (NVIDIA, 1, (16, 1, 4 * 8), None, no_mesh, ''),
    (NVIDIA, 1, (1, 1, 4 * 8), None, no_mesh, 'a row has 1 tokens, and it needs 16'),
    (T4, 1, SHAPE, None, no_mesh, OLD),
    (('cpu', ('cpu',)), 1, SHAPE, None, no_mesh, 'it needs an NVIDIA GPU, and JAX runs on cpu'),
    (AMD, 1, SHAPE, None, no_mesh, OLD),
    (NVIDIA, 1, SHAPE, 'some', no_mesh, 'it has no padding'),
    (NVIDIA, 4, SHAPE, None, no_mesh, 'on several devices it needs rows that are split evenly over a mesh'),
    (NVIDIA, 3, SHAPE, None, Mesh(3), 'on several devices it needs rows that are split evenly over a mesh'),
    (NVIDIA, 1, (128, 128, 4 * 1020), None, no_mesh, 'model.dim=1020 is not divisible by 8'),
  ],
)
def test_where_it_is_taken(backend, devices, shape, valid, constrain, obstacle, monkeypatch):
  on(monkeypatch, *backend, devices)
  assert recurrence_kernels.obstacle(shape, valid, constrain) == obstacle
  assert recurrence_kernels.choose('auto', shape, valid, constrain) == ('plain' if obstacle else 'triton')
  assert recurrence_kernels.choose('plain', shape, valid, constrain) == 'plain'


def test_a_version_of_jax_without_triton_takes_the_plain_loop(monkeypatch):
  on(monkeypatch, *NVIDIA, 1)
  monkeypatch.setitem(sys.modules, 'jax.experimental.pallas.triton', None)
  monkeypatch.delattr('jax.experimental.pallas.triton', raising=False)
  assert 'has no Triton' in recurrence_kernels.obstacle(SHAPE, None, no_mesh)


def test_a_kernel_that_is_named_and_cannot_train_is_refused(monkeypatch):
  config = lstm.LSTMConfig(dim=1020, recurrence_kernel='triton')
  message = r"^model\.recurrence_kernel='triton': it needs an NVIDIA GPU, and JAX runs on cpu$"
  with pytest.raises(errors.UserError, match=message):
    build.check_kernel(build.build(config, 64, 128), 128, False)
  on(monkeypatch, *NVIDIA, 1)
  with pytest.raises(errors.UserError, match=r'model\.dim=1020 is not divisible by 8$'):
    build.check_kernel(build.build(config, 64, 128), 128, False)
  config.recurrence_kernel = 'auto'
  build.check_kernel(build.build(config, 64, 128), 128, False)


def test_tiles_divide_the_state_and_are_powers_of_two():
  for batch, dim in [(128, 1024), (128, 1840), (1, 8), (6, 24), (32, 4096), (7, 650)]:
    rows, columns = recurrence_kernels.tile(batch, dim)
    assert (batch % rows, dim % columns) == (0, 0)
    assert rows * columns <= recurrence_kernels.TILE
    assert (rows & (rows - 1), columns & (columns - 1)) == (0, 0)


def test_a_model_trains_through_it_as_through_the_plain_loop(monkeypatch):
  """The whole model, whose layers choose: loss and gradients."""
  tokens_BT = np.random.default_rng(0).integers(0, 32, (8, 12))
  starts_BT = np.random.default_rng(1).random((8, 12)) < 0.2
  model = build.build(lstm.LSTMConfig(dim=16, compute_dtype='float32', recurrent_dropout=0.2, weight_dropout=0.2), 32, 12)
  params = model.init(jax.random.PRNGKey(0), tokens_BT, method='init_everything')['params']

  def total(params):
    how = {'deterministic': False, 'rngs': {'dropout': jax.random.PRNGKey(1)}}
    hidden_BTD, _ = model.apply({'params': params}, tokens_BT, starts_BT=starts_BT, **how)
    return jnp.sin(hidden_BTD).sum()

  expected = quick_jit(jax.value_and_grad(total))(params)
  taken = []
  monkeypatch.setattr(recurrence_kernels, 'obstacle', lambda *args: taken.append(args) or '')
  apply = functools.partial(recurrence_kernels.apply, interpret=True)
  monkeypatch.setattr(recurrence_kernels, 'apply', apply)
  found = quick_jit(jax.value_and_grad(lambda params: total(params)))(params)
  assert len(taken) == 2
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-6 * np.abs(y).max()), found, expected)
