"""How a fresh state's random numbers are made."""

import jax
import pytest

from textgen_jax import backend, sharding
from textgen_jax.models import base, build, transformer
from textgen_jax.training import optimizer, state


@pytest.mark.parametrize(('kind', 'kernel'), [('gpu', True), ('cpu', False)])
def test_on_one_gpu_a_kernel_makes_random_bits_and_the_setting_is_left_as_it_was(kind, kernel, monkeypatch):
  seen = []
  init_params = base.init_params

  def looking(model, key):
    seen.append(jax.config.jax_threefry_gpu_kernel_lowering)
    return init_params(model, key)

  monkeypatch.setattr(base, 'init_params', looking)
  config = sharding.ShardingConfig()
  model = build.build(transformer.TransformerConfig(dim=8, num_layers=1, num_heads=2), 16, 8)
  fresh, _, _ = state.create(model, optimizer.build(optimizer.OptimizerConfig(schedule_steps=1)), 0, 0, config, sharding.make_mesh(config))
  monkeypatch.setattr(backend, 'name', lambda: kind)
  fresh()
  assert seen[-1] is kernel
  assert jax.config.jax_threefry_gpu_kernel_lowering is False
