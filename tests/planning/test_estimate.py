"""FLOPs and times, worked by hand."""

import conftest
import pytest

from textgen_jax import command_line
from textgen_jax import experiment as experiment_lib
from textgen_jax.planning import ahead, devices, estimate

GPT2_KERNELS = 12 * 12 * 768**2  # four of [768, 768] and two of [768, 3072] a block


def gpt2(topology='h100:1x1', **training):
  experiment = experiment_lib.resolve(command_line.load_config(f'{conftest.CONFIGS}/gpt2_124m.py'))
  for name, value in training.items():
    setattr(experiment.training, name, value)
  return estimate.make(experiment, 257, devices.parse(topology))


def test_flops_of_gpt2():
  """6 a weight, the tied table once, and 12 a layer, key and channel."""
  plan = gpt2()
  assert plan.vocab == 50_304
  assert plan.parameters == GPT2_KERNELS + (50_304 + 1024) * 768 + 25 * 768
  assert plan.non_embedding == GPT2_KERNELS + 25 * 768
  assert plan.flops_per_token == 6 * (GPT2_KERNELS + 50_304 * 768) + 12 * 12 * 768 * 1024
  assert plan.flops_per_step == plan.flops_per_token * 480 * 1024


def test_time_of_gpt2():
  plan = gpt2()
  assert plan.times.products == pytest.approx(plan.flops_per_step / 989e12 / estimate.EFFICIENCY)
  assert plan.times.update == pytest.approx(2 * (12 + 8) * plan.parameters / 3350e9, rel=1e-4)
  assert plan.times.hidden == plan.times.waited == plan.times.recurrence == 0
  assert plan.times.step == plan.times.products + plan.times.update
  eight = gpt2('h100:8x1', accumulation_steps=5)
  assert eight.times.products == pytest.approx(plan.times.products / 8)
  sums = 2 * GPT2_KERNELS + 4 * (eight.parameters - GPT2_KERNELS)  # bytes: those of kernels are in bfloat16
  assert eight.times.hidden == pytest.approx(5 * 2 * sums * 7 / 8 / 450e9, rel=1e-4)


def test_computing_again_takes_a_third_more(make):
  once, again = (estimate.make(make(remat=remat), 257, devices.parse('v5e:2x2')) for remat in ('none', 'full'))
  assert again.flops_per_token == once.flops_per_token
  assert again.times.products == pytest.approx(4 / 3 * once.times.products)


def test_an_lstm_reads_its_recurrence_at_each_token(make):
  plan = estimate.make(make('lstm'), 257, devices.parse('v5e:1x1'))
  assert plan.times.recurrence == pytest.approx(2 * 32 * 2 * 64 * 256 * 2 / 819e9)  # passes, tokens, layers, kernel, bfloat16
  assert plan.footprint.carry == 2 * 16 * 2 * 64 * 4


def test_one_chip_takes_splash_as_several_do(make):
  for name in ('v5e:1x1', 'v5e:2x2'):
    assert estimate.make(make(fsdp=-1, training={'sequence_length': 128}), 257, devices.parse(name)).kernel == 'splash'


def test_nothing_is_known_of_a_cpus_time(make):
  assert estimate.make(make(), 257, devices.parse('cpu:4')).times is None


def test_cudnns_kernel_is_stood_in_for_where_it_could_run(make):
  for model, training, kernel in [({}, {}, 'blocks'), ({'attention_dropout': 0.1}, {}, 'plain'), ({}, {'mask_documents': True}, 'plain')]:
    experiment, note = ahead.stand_in(make(training=training, **model), devices.parse('h100:4x1'))
    assert bool(note) == (kernel == 'blocks')
    assert estimate.make(experiment, 257, devices.parse('h100:4x1')).kernel == kernel
  spread = make(fsdp=1, tensor=4, num_kv_heads=2)  # two groups of keys over four devices
  experiment, note = ahead.stand_in(spread, devices.parse('h100:4x1'))
  assert (experiment, note) == (spread, '')
  assert estimate.make(experiment, 257, devices.parse('h100:4x1')).kernel == 'plain'
  for family, kernel in (('a100', 'plain'), ('h100', 'blocks')):  # of 136 a head
    experiment, note = ahead.stand_in(make(dim=4 * 136), devices.parse(f'{family}:1x1'))
    assert estimate.make(experiment, 257, devices.parse(f'{family}:1x1')).kernel == kernel
  for kernel, said in [('auto', True), ('triton', True), ('plain', False)]:
    experiment, note = ahead.stand_in(make('lstm', recurrence_kernel=kernel), devices.parse('h100:4x1'))
    assert (experiment.model.recurrence_kernel, 'plain loop' in note) == ('plain', said)
    assert estimate.make(experiment, 257, devices.parse('h100:4x1')).kernel == 'plain'
  experiment, note = ahead.stand_in(make(), devices.parse('v5e:2x2'))
  assert (experiment.model.attention_kernel, note) == ('auto', '')
