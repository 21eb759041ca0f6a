"""Bytes between devices, worked by hand."""

import pytest

from textgen_jax.planning import devices, estimate

VOCAB = 257
TABLES, SCALES = 2 * 264 * 64, 2 * 2 * 16  # numbers: of both tables of tokens; of norms of queries and keys, which have no axis to split


def told(experiment, topology='v5e:2x2'):
  plan = estimate.make(experiment, VOCAB, devices.parse(topology))
  return plan, {(one.kind, one.over): one for one in plan.traffic}


def test_split_parameters_are_gathered_and_their_gradients_scattered(make):
  plan, found = told(make(fsdp=4))
  kernels = plan.parameters - SCALES - TABLES - 5 * 64  # and norms, which are gathered once
  assert found['all-gather', 'fsdp'].bytes == pytest.approx((2 * kernels + TABLES + 5 * 64) * 2 * 3 / 4, abs=99)  # bfloat16
  assert found['reduce-scatter', 'fsdp'].bytes == pytest.approx((2 * kernels + 4 * TABLES + 4 * 5 * 64) * 3 / 4, abs=99)
  assert found['all-reduce', 'data x fsdp'].bytes == pytest.approx(2 * SCALES * 4 * 3 / 4, rel=0.05)
  assert found['all-gather', 'fsdp'].seconds == pytest.approx(found['all-gather', 'fsdp'].bytes / 100e9)


def test_copies_sum_their_gradients(make):
  plan, found = told(make(data=4, fsdp=1))
  assert {kind for kind, _ in found} == {'all-reduce'}
  kernels = plan.parameters - SCALES - TABLES - 5 * 64
  assert sum(one.bytes for one in found.values()) == pytest.approx(2 * (2 * kernels + 4 * (plan.parameters - kernels)) * 3 / 4, abs=99)


def test_each_micro_batch_does_so_anew(make):
  (_, once), (_, twice) = told(make(fsdp=4)), told(make(fsdp=4, training={'accumulation_steps': 2}))
  assert twice['all-gather', 'fsdp'].bytes == pytest.approx(2 * once['all-gather', 'fsdp'].bytes, rel=1e-6)


@pytest.mark.parametrize(('remat', 'passes'), [('none', 2), ('dots', 2), ('full', 3)])
def test_tensor_parallel_devices_sum_each_blocks_two_branches(remat, passes, make):
  _, found = told(make(fsdp=1, tensor=4, remat=remat))
  residual = 16 * 32 * 64 * 2  # rows, tokens, dim, bfloat16
  assert found['all-reduce', 'tensor'].bytes == pytest.approx((2 * passes * 2 + 2) * residual * 2 * 3 / 4)
  assert found['all-reduce', 'tensor'].waits


def test_one_device_says_nothing(make):
  assert told(make(), 'h100:1x1')[1] == {}


def test_hosts_are_slower_than_the_links_within(make):
  _, inside = told(make(fsdp=8, dim=128), 'h100:8x1')
  _, across = told(make(data=8, fsdp=2, dim=128), 'h100:2x8')
  assert inside['all-gather', 'fsdp'].seconds == pytest.approx(inside['all-gather', 'fsdp'].bytes / 450e9)
  assert across['all-reduce', 'data'].seconds == pytest.approx(across['all-reduce', 'data'].bytes / 50e9)
