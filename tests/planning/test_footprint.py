"""What must hold of the estimate of memory, whatever its figures."""

import dataclasses

import pytest

from textgen_jax import backend
from textgen_jax.planning import devices, estimate, footprint

VOCAB = 257


def of(experiment, topology='v5e:4x4'):
  return estimate.make(experiment, VOCAB, devices.parse(topology)).footprint


@pytest.mark.parametrize('kind', ['transformer', 'lstm'])
def test_the_state_falls_as_devices_share_it(kind, make):
  whole, parts = of(make(kind, data=16, fsdp=1)), of(make(kind, data=1, fsdp=16))
  for name in ('params', 'optimizer', 'gradients'):
    all_of_it = getattr(whole, name)
    assert all_of_it / 16 < getattr(parts, name) < 1.1 * all_of_it / 16  # vectors without an axis to split stay whole
  assert parts.carry == whole.carry  # rows are split either way
  assert parts.activations == whole.activations


def test_adamw_holds_two_moments_muon_one_of_matrices_and_an_average_a_copy(make):
  adamw, muon, averaged = of(make()), of(make(kind_of_optimizer='muon')), make()
  averaged.optimizer.average_decay = 0.99
  assert adamw.optimizer == pytest.approx(2 * adamw.params, rel=1e-3)
  assert 1.2 * adamw.params < muon.optimizer < 1.8 * adamw.params
  assert of(averaged).params == 2 * adamw.params


def lengths(make, **model):
  return [of(make(training={'sequence_length': length}, **model), 'v5e:2x2').activations for length in (256, 512, 1024)]


@pytest.mark.parametrize('kernel', ['blocks', 'splash'])
def test_activations_grow_with_the_length(kernel, make):
  one, two, four = lengths(make, attention_kernel=kernel)
  assert (two, four) == pytest.approx((2 * one, 4 * one), rel=1e-6)


def test_all_weights_at_once_grow_with_its_square(make):
  one, two, four = lengths(make, attention_kernel='plain')
  assert (four - 4 * one) == pytest.approx(12 * (two - 2 * one) / 2)  # a T + b T^2
  weights = two - 2 * one  # 2 b T^2: heads x rows x layers, float32 and bfloat16
  assert weights == 2 * 256**2 * 4 * 4 * 2 * (4 + 2)


def test_computing_again_keeps_the_blocks_inputs_alone(make):
  kept, again = of(make(), 'v5e:2x2'), of(make(remat='full'), 'v5e:2x2')
  assert again.activations == 2 * 4 * 32 * 64 * 2  # layers, rows, tokens, dim, bfloat16
  assert again.activations < kept.activations / 10
  assert again.working > kept.working


def test_micro_batches_take_less_and_keep_their_sums(make):
  whole, parts = of(make()), of(make(training={'accumulation_steps': 1, 'batch_size': 64}))
  quarter = of(make(training={'accumulation_steps': 4, 'batch_size': 64}))
  assert (parts.activations, quarter.activations) == (4 * whole.activations, whole.activations)
  assert quarter.gradients == 2 * parts.gradients


def test_tensor_parallel_devices_share_heads_and_hidden_units(make):
  alone, shared = (footprint.transformer_layer(make().model, 'blocks', 32, ways, ways) for ways in (1, 4))
  assert alone.kept / 4 < shared.kept < alone.kept / 2  # the residual stream stays whole


def test_an_lstm_keeps_gates_and_cells_in_float32(make):
  config = make('lstm', compute_dtype='bfloat16').model
  with backend.target('tpu'):
    assert dataclasses.astuple(footprint.lstm_layer(config)) == (64 * (4 * 4 + 4 + 2), 64 * (4 * 4 + 4 * 2 + 4))
  with backend.target('gpu'):
    assert dataclasses.astuple(footprint.lstm_layer(config)) == (64 * (4 * 4 + 4 + 2 + 4 * 4), 64 * (4 * 2 + 4))


def test_a_large_vocabulary_is_read_in_chunks(make):
  few, many = (of(make(vocab_multiple=size, training={'sequence_length': 4096, 'batch_size': 16})).logits for size in (8, 2**17))
  most = 512 * 2**20
  assert few == 4096 * 264 * (4 + 4 + 2)
  assert many <= 2.5 * most + 8 * 64 * 2**17
