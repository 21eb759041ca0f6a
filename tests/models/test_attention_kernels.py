"""Every kernel equals JAX's own attention under a mask that is spelled out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from textgen_jax import backend, errors
from textgen_jax.models import attention, attention_kernels, build, transformer

B, K = 2, 8
# T, window, heads, groups, documents.
SETTINGS = [(256, 256, 4, 4, False), (256, 37, 4, 2, False), (256, 256, 2, 1, True), (384, 200, 4, 2, True)]

quick_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def draw(time, heads, groups, seed=0):
  rng = np.random.default_rng(seed)
  q_BTHK = rng.normal(size=(B, time, heads, K)).astype(np.float32)
  k_BGSK, v_BGSK = rng.normal(size=(2, B, groups, time, K)).astype(np.float32)
  return q_BTHK, k_BGSK, v_BGSK


def look(time, window, documents):
  """The rule, and the mask that it should mean."""
  t = np.arange(time)
  mask_BTS = np.broadcast_to((t <= t[:, None]) & (t > t[:, None] - window), (B, time, time))
  if not documents:
    return attention_kernels.Sight(window), mask_BTS
  segment_BT = np.cumsum(np.random.default_rng(1).random((B, time)) < 0.03, axis=1, dtype=np.int32)
  assert segment_BT.max() > 3
  return attention_kernels.Sight(window, jnp.asarray(segment_BT)), mask_BTS & (segment_BT[:, :, None] == segment_BT[:, None, :])


def reference(q_BTHK, k_BGSK, v_BGSK, mask_BTS, is_causal=False):
  k_BSGK, v_BSGK = (jnp.asarray(x).swapaxes(1, 2) for x in (k_BGSK, v_BGSK))
  return jax.nn.dot_product_attention(q_BTHK, k_BSGK, v_BSGK, mask=mask_BTS[:, None], implementation='xla')


def values_and_grads(function, arrays):
  """The output, and the gradients of a weighted sum of it."""
  weights = np.random.default_rng(2).normal(size=arrays[0].shape)

  def total(*arrays):
    y_BTHK = function(*arrays)
    return (y_BTHK * weights).sum(), y_BTHK

  grads, y_BTHK = quick_jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*arrays)
  return y_BTHK, *grads


def assert_equal(function, arrays, mask_BTS):
  expected = values_and_grads(functools.partial(reference, mask_BTS=mask_BTS), arrays)
  for one, other in zip(values_and_grads(function, arrays), expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('time', 'window', 'heads', 'groups', 'documents'), [*SETTINGS, (131, 50, 4, 2, True), (9, 4, 2, 2, False)])
def test_blocks(time, window, heads, groups, documents, monkeypatch):
  monkeypatch.setattr(attention_kernels, 'SHORTEST_SPAN', 100)
  monkeypatch.setattr(attention_kernels, 'LARGEST_BLOCK', 25)  # so that a span has several, the last of them padded
  sight, mask_BTS = look(time, window, documents and time > 9)
  assert_equal(functools.partial(attention_kernels.blocks, sight=sight), draw(time, heads, groups), mask_BTS)


@pytest.mark.parametrize(('time', 'window', 'heads', 'groups', 'documents'), SETTINGS)
def test_splash(time, window, heads, groups, documents, monkeypatch):
  monkeypatch.setattr(attention_kernels, 'LARGEST_SPLASH_BLOCK', 128)  # so that there are several
  sight, mask_BTS = look(time, window, documents)
  function = functools.partial(attention_kernels.splash, sight=sight, interpret=True)
  assert_equal(function, draw(time, heads, groups), mask_BTS)


@pytest.mark.parametrize('window', [40, 7, 1])
def test_cudnn_is_asked_for_the_same_attention(window, monkeypatch):
  """JAX's own implementation stands in for cuDNN's, with the arguments that cuDNN's gets."""
  asked, attend = [], jax.nn.dot_product_attention

  def stand_in(*arrays, implementation, **how):
    asked.append(implementation)
    return attend(*arrays, **how)

  sight, mask_BTS = look(40, window, documents=False)
  arrays = draw(40, 4, 2)
  expected = reference(*arrays, mask_BTS)
  monkeypatch.setattr(jax.nn, 'dot_product_attention', stand_in)
  np.testing.assert_allclose(attention_kernels.cudnn(*arrays, sight), expected, rtol=1e-5, atol=1e-5)
  assert asked == ['cudnn']


def test_memory_of_blocks_grows_with_the_length(monkeypatch):
  monkeypatch.setattr(attention_kernels, 'SPANS', 2)  # compiles in a third of the time

  def temporary_bytes(function, time):
    arrays = draw(time, 4, 4)
    run = quick_jit(jax.grad(lambda *arrays: function(*arrays).sum(), argnums=(0, 1, 2)))
    return run.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

  def blocks(*arrays):
    return attention_kernels.blocks(*arrays, attention_kernels.Sight(arrays[0].shape[1]))

  def plain(*arrays):
    return reference(*arrays, np.tril(np.ones((1, arrays[0].shape[1], arrays[0].shape[1]), bool)))

  slim, slim_twice, full_twice = temporary_bytes(blocks, 2048), temporary_bytes(blocks, 4096), temporary_bytes(plain, 4096)
  assert slim_twice < 2.5 * slim
  assert slim_twice < 0.25 * full_twice


def test_dropout_of_blocks(monkeypatch):
  """With one-hot values the output is the dropped weights themselves."""
  monkeypatch.setattr(attention_kernels, 'SHORTEST_SPAN', 16)
  monkeypatch.setattr(attention_kernels, 'LARGEST_BLOCK', 8)
  time, rate = 32, 0.25
  q_BTHK, k_BGSK, _ = draw(time, 4, 2)
  v_BGSK = np.broadcast_to(np.eye(time, dtype=np.float32), (B, 2, time, time))
  weights_BTHS = np.random.default_rng(3).normal(size=(B, time, 4, time))
  sight = attention_kernels.Sight(time)

  @quick_jit
  def drop(key):
    def draw(v_BGSK):
      p_BTHS = attention_kernels.blocks(q_BTHK, k_BGSK, v_BGSK, sight, rate, key)
      return (p_BTHS * weights_BTHS).sum(), p_BTHS

    slope_BGSK, p_BTHS = jax.grad(draw, has_aux=True)(v_BGSK)
    return p_BTHS, slope_BGSK

  dropped_BTHS, slope_BGSK = drop(jax.random.PRNGKey(0))
  kept = np.asarray(dropped_BTHS > 0)
  mask_BTS = np.broadcast_to(np.tril(np.ones((time, time), bool)), (B, time, time))
  scores_BHTS = np.einsum('BTGRK,BGSK->BGRTS', q_BTHK.reshape(B, time, 2, 2, K), k_BGSK).reshape(B, 4, time, time) / K**0.5
  p_BTHS = np.asarray(jax.nn.softmax(np.where(mask_BTS[:, None], scores_BHTS, -np.inf))).swapaxes(1, 2)
  np.testing.assert_allclose(np.asarray(dropped_BTHS)[kept], p_BTHS[kept] / (1 - rate), rtol=1e-4)
  seen = np.broadcast_to(mask_BTS[:, :, None], kept.shape)
  assert not kept[~seen].any()
  assert abs(kept[seen].mean() - (1 - rate)) < 4 * (rate * (1 - rate) / seen.sum()) ** 0.5
  # No two rows, heads, spans or blocks share their draws.
  draws = [kept[b, low : low + 8, h, :8] for b in range(B) for h in range(4) for low in range(8, time, 8)]
  assert len({one.tobytes() for one in draws}) == len(draws)
  assert (drop(jax.random.PRNGKey(1))[0] != dropped_BTHS).any()
  # What is computed anew in the backward pass is dropped alike.
  expected = np.einsum('BTGRS,BTGRK->BGSK', *(x.reshape(B, time, 2, 2, time) for x in (dropped_BTHS, weights_BTHS)))
  np.testing.assert_allclose(slope_BGSK, expected, rtol=1e-4, atol=1e-4)


# In a model.

CONFIG = transformer.TransformerConfig(dim=16, num_layers=2, num_heads=4, num_kv_heads=2, remat='full', compute_dtype='float32')


def read(model, params, tokens_BT, valid_BT, starts_BT):
  return model.apply({'params': params}, tokens_BT, None, valid_BT, starts_BT)[0]


@pytest.mark.parametrize(('context_length', 'holes'), [(24, True), (9, False)])
def test_a_model_in_blocks_equals_the_plain_one(context_length, holes, random_params, monkeypatch):
  """Documents, holes and windows shorter than the row, as the model tells kernels of them."""
  monkeypatch.setattr(attention_kernels, 'SHORTEST_SPAN', 12)
  monkeypatch.setattr(attention_kernels, 'LARGEST_BLOCK', 8)
  rng = np.random.default_rng(0)
  tokens_BT = rng.integers(29, size=(3, 24), dtype=np.int32)
  valid_BT, starts_BT = rng.random((3, 24)) < (0.8 if holes else 1), rng.random((3, 24)) < 0.2
  plain, slim = (build.build(dataclasses.replace(CONFIG, attention_kernel=name), 29, context_length) for name in ('plain', 'blocks'))
  params, asked = random_params(plain), count_calls(monkeypatch, 'blocks')
  arrays = params, tokens_BT, valid_BT if holes else None, starts_BT
  expected, actual = (quick_jit(read, static_argnums=0)(model, *arrays) for model in (plain, slim))
  assert asked
  np.testing.assert_allclose(actual[valid_BT], expected[valid_BT], rtol=1e-4, atol=1e-5)


def count_calls(monkeypatch, name):
  """A list that grows with each call of a kernel."""
  asked, kernel = [], getattr(attention_kernels, name)

  def counted(*args):
    asked.append(name)
    return kernel(*args)

  monkeypatch.setattr(attention_kernels, name, counted)
  return asked


def test_which_calls_of_a_model_kernels_know(random_params, monkeypatch):
  asked, some_BT = count_calls(monkeypatch, 'blocks'), np.zeros((3, 24), bool)
  for context_length in (24, 9):
    model = build.build(dataclasses.replace(CONFIG, attention_kernel='blocks', remat='none'), 29, context_length)
    params = random_params(model)
    for valid_BT, starts_BT in ((None, None), (None, some_BT), (some_BT, None)):
      asked.clear()
      jax.eval_shape(lambda *args, model=model, params=params: read(model, params, *args), some_BT.astype(int), valid_BT, starts_BT)
      # Where holes meet a window that is shorter than the row, places don't tell who sees whom.
      assert len(asked) == (0 if valid_BT is not None and context_length < 24 else 2)
    asked.clear()
    jax.eval_shape(lambda model=model, params=params: model.apply({'params': params}, some_BT.astype(int), model.init_cache(3, 32)))
    assert not asked


@pytest.mark.parametrize('method', ['mix', 'scores', 'collect'])
def test_a_variant_is_never_passed_over(method, random_params, monkeypatch):
  """Whatever it overrides, its own code runs, and to name a kernel for it is a mistake."""
  called = []

  def own(self, *args):
    called.append(method)
    return getattr(super(Variant, self), method)(*args)

  Variant = type('Variant', (attention.Attention,), {method: own})
  config = dataclasses.replace(CONFIG, attention_kernel='blocks', remat='none')
  model = transformer.Transformer(config, 29, 24, Variant)
  params, asked = random_params(model), count_calls(monkeypatch, 'blocks')
  called.clear()
  jax.eval_shape(lambda: read(model, params, np.zeros((2, 24), np.int32), None, None))
  assert (called, asked) == ([method] * 2, [])
  with pytest.raises(errors.UserError, match=r"model\.attention_kernel='blocks': the variant that model\.attention names"):
    build.check_kernel(model, 24, segmented=False)
  build.check_kernel(transformer.Transformer(config, 29, 24), 24, segmented=False)


# Which kernel a call gets.


def abstract(time=1024, head_dim=64, dtype='bfloat16'):
  return jax.ShapeDtypeStruct((4, time, 12, head_dim), dtype), jax.ShapeDtypeStruct((4, 6, time, head_dim), dtype)


@pytest.mark.parametrize(('capability', 'most'), [(8.0, 128), (9.0, 256)])
def test_what_is_known_of_cudnn_where_the_gpu_is_not_is_what_jax_says(capability, most, monkeypatch):
  """The widths and types of heads that JAX's own check takes, on a GPU that it is made to see."""
  monkeypatch.setattr('jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version', lambda: 91200)
  monkeypatch.setattr('jax._src.cudnn.fused_attention_stablehlo.check_compute_capability', lambda asked: capability >= float(asked))
  for dtype in ('bfloat16', 'float32'):
    for width in (8, 12, 18, 128, 132, 136, 256, 264):
      q_BTHK, k_BGSK = abstract(head_dim=width, dtype=dtype)
      try:
        jax.eval_shape(functools.partial(attention_kernels.cudnn, sight=CAUSAL), q_BTHK, k_BGSK, k_BGSK)
        takes = True
      except NotImplementedError:
        takes = False
      assert takes == (dtype == 'bfloat16' and width <= most and width % 8 == 0)
      with backend.target('gpu', 1, capability):
        reason = attention_kernels.obstacle('cudnn', q_BTHK, k_BGSK, CAUSAL, no_mesh, dropout=0.0, changed=False)
      assert (reason == backend.ABSENT_GPU) == takes


@pytest.mark.parametrize(('planned', 'here', 'kernel'), [(1, 8, 'splash'), (8, 1, 'plain')])
def test_a_plan_is_for_its_own_number_of_devices(planned, here, kernel, monkeypatch):
  monkeypatch.setattr(jax, 'device_count', lambda: here)
  with backend.target('tpu', planned):
    assert attention_kernels.choose('auto', *abstract(), CAUSAL, no_mesh, dropout=0.0, changed=False) == kernel


class FakeGPU:
  device_kind = 'NVIDIA of the test'

  def __init__(self, compute_capability, platform_version='PJRT C API\ncuda 13000'):
    self.compute_capability, self.client = compute_capability, self
    self.platform_version = platform_version


def on(monkeypatch, backend, device=None, devices=1):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  monkeypatch.setattr(jax, 'local_devices', lambda: [device])
  monkeypatch.setattr(jax, 'device_count', lambda: devices)
  # JAX's own checks of types and widths are left as they are: it finds no cuDNN here.
  monkeypatch.setattr('jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version', lambda: 91200)


CAUSAL, MASKED = attention_kernels.Sight(1024), attention_kernels.Sight(1024, jnp.zeros((4, 1024), int))
A100, T4 = FakeGPU('8.0'), FakeGPU('7.5')
GPU, TPU = ('gpu', A100), ('tpu',)


def no_mesh(x, names):
  del names
  return x


class Mesh:
  def __init__(self, row_ways):
    self.row_ways = row_ways

  def ways(self, name):
    return self.row_ways if name == 'batch' else 1


@pytest.mark.parametrize(
  ('where', 'shapes', 'sight', 'changes', 'expected'),
  [
    (GPU, {}, CAUSAL, {}, 'cudnn'),
    (('gpu', FakeGPU('12.0')), {}, CAUSAL, {}, 'cudnn'),
    (GPU, {'head_dim': 128}, CAUSAL, {}, 'cudnn'),
    (GPU, {'head_dim': 36}, CAUSAL, {}, 'plain'),
    (GPU, {'dtype': 'float32'}, CAUSAL, {}, 'plain'),
    (GPU, {}, MASKED, {}, 'plain'),
    (GPU, {}, CAUSAL, {'dropout': 0.1}, 'plain'),
    (GPU, {}, CAUSAL, {'changed': True}, 'plain'),
    (GPU, {}, None, {}, 'plain'),
    (('gpu', T4), {}, CAUSAL, {}, 'plain'),
    (('gpu', FakeGPU('gfx942', 'PJRT C API\nrocm 60300')), {}, CAUSAL, {}, 'plain'),
    ((*GPU, 8), {}, CAUSAL, {}, 'plain'),
    ((*GPU, 8), {}, CAUSAL, {'constrain': Mesh(8)}, 'plain'),
    ((*GPU, 8), {}, CAUSAL, {'constrain': Mesh(4)}, 'cudnn'),
    (TPU, {}, CAUSAL, {}, 'splash'),
    (TPU, {'dtype': 'float32'}, MASKED, {}, 'splash'),
    (TPU, {'time': 1000}, CAUSAL, {}, 'plain'),
    (TPU, {}, CAUSAL, {'dropout': 0.1}, 'plain'),
    (('cpu',), {}, CAUSAL, {}, 'causal'),
    (('cpu', None, 2), {}, CAUSAL, {}, 'causal'),
    (('cpu',), {}, MASKED, {}, 'plain'),
    (('cpu',), {}, CAUSAL, {'dropout': 0.1}, 'plain'),
    (('cpu',), {}, CAUSAL, {'changed': True}, 'plain'),
  ],
)
def test_auto(where, shapes, sight, changes, expected, monkeypatch):
  on(monkeypatch, *where)
  how = {'constrain': no_mesh, 'dropout': 0.0, 'changed': False} | changes
  assert attention_kernels.choose('auto', *abstract(**shapes), sight, **how) == expected
  assert attention_kernels.choose('plain', *abstract(**shapes), sight, **how) == 'plain'
  if sight is not None and 'changed' not in changes:
    assert attention_kernels.choose('blocks', *abstract(**shapes), sight, **how) == 'blocks'


@pytest.mark.parametrize(
  ('kernel', 'where', 'changes', 'length', 'segmented', 'message'),
  [
    ('cudnn', ('cpu',), {}, 1024, False, 'needs an NVIDIA GPU, and JAX runs on cpu'),
    ('splash', GPU, {}, 1024, False, 'needs a TPU, and JAX runs on gpu'),
    ('cudnn', ('gpu', T4), {}, 1024, False, 'compute capability 8.0 or more, and this is NVIDIA of the test'),
    ('cudnn', GPU, {'attention_dropout': 0.2}, 1024, False, r'drops no attention weights, and model\.attention_dropout is 0\.2'),
    ('cudnn', GPU, {}, 1024, True, 'masks no documents'),
    ('cudnn', GPU, {'dim': 36 * 4}, 1024, False, 'head dim must be .* multiple of 8, but got 36'),
    ('cudnn', GPU, {'compute_dtype': 'float32'}, 1024, False, 'must be fp16/bf16'),
    ('splash', TPU, {}, 1000, False, "a row's 1000 tokens aren't a multiple of 128"),
    ('splash', ('tpu', None, 4), {}, 1024, False, 'rows and groups of heads that are split evenly over a mesh'),
  ],
)
def test_what_a_named_kernel_cannot_train(kernel, where, changes, length, segmented, message, monkeypatch):
  on(monkeypatch, *where)
  config = transformer.TransformerConfig(**{'dim': 128, 'num_heads': 4, 'num_layers': 1, 'attention_kernel': kernel} | changes)
  with pytest.raises(errors.UserError, match=rf"^model\.attention_kernel='{kernel}': .*{message}"):
    build.check_kernel(build.build(config, 29, length), length, segmented)
  build.check_kernel(build.build(dataclasses.replace(config, attention_kernel='auto'), 29, length), length, segmented)


def test_a_named_kernel_that_can_train(monkeypatch):
  config = transformer.TransformerConfig(dim=128, num_heads=4, num_layers=1)
  for kernel, where, segmented in (('cudnn', GPU, False), ('splash', TPU, True), ('blocks', ('cpu',), True)):
    on(monkeypatch, *where)
    build.check_kernel(build.build(dataclasses.replace(config, attention_kernel=kernel), 29, 1024), 1024, segmented)
