"""Names of topologies, and figures that follow from the makers' by hand."""

import pytest

from textgen_jax import errors
from textgen_jax.planning import devices


@pytest.mark.parametrize(
  ('name', 'told'),
  [
    ('h10:8x1', "did you mean 'h100:8x1'"),
    ('v5e:16x15', "did you mean 'v5e:16x16'"),
    ('v5e', "did you mean 'v5e:"),
    ('v5p:8x8', "did you mean 'v5p:8x8x8'"),
    ('h100:8', 'h100:GPUSxHOSTS'),
    ('h100:08x01', 'h100:GPUSxHOSTS'),
    ('h100:٨x١', 'h100:GPUSxHOSTS'),
    ('cpu:४', 'cpu:DEVICES'),
    ('cpu:08', 'cpu:DEVICES'),
    ('h100:3x1', 'a host has 1, 2, 4, 8 GPUs, not 3'),
    ('h100:8x0', 'has 0 devices'),
    ('h100:8x99999', 'has 799992 devices'),
    ('cpu:two', 'cpu:DEVICES'),
    ('', 'is none of v5e:16x16'),
  ],
)
def test_wrong_names(name, told):
  with pytest.raises(errors.UserError, match=f"^topology='{name}'.*{told}"):
    devices.parse(name)


@pytest.mark.parametrize(
  ('name', 'stride', 'size', 'gigabytes'),
  [
    ('v5e:16x16', 1, 256, 200),  # two rings, 4 links of 50
    ('v5e:8x16', 1, 128, 150),  # a line and a ring
    ('v5e:2x2', 1, 4, 100),
    ('v5e:1x1', 1, 1, 0),
    ('v5p:8x8x8', 1, 512, 600),
    ('v5p:2x2x1', 1, 4, 200),
    ('h100:8x4', 1, 8, 450),  # within a host
    ('h100:8x4', 1, 32, 400),  # the eight ports of a host
    ('h100:8x4', 8, 4, 50),  # each GPU with its like in other hosts
    ('h100:8x4', 4, 8, 100),  # two GPUs of each host
    ('a100:8x4', 1, 16, 200),
  ],
)
def test_bandwidth(name, stride, size, gigabytes):
  assert devices.parse(name).bandwidth(stride, size) == pytest.approx(gigabytes * 1e9)


def test_every_accelerator_has_a_peak_and_a_name_of_its_own():
  found = {family: device.flops for family, device in devices.DEVICES.items() if device.kind != 'cpu'}
  assert found == {'v5e': 197e12, 'v5p': 459e12, 'v6e': 918e12, 'a100': 312e12, 'h100': 989e12, 'h200': 989e12}


def test_jax_takes_three_quarters_of_a_gpu(monkeypatch):
  monkeypatch.delenv(devices.GPU_SHARE_VARIABLE, raising=False)
  whole = devices.DEVICES['h100'].total_bytes
  assert devices.DEVICES['h100'].memory_bytes == int(0.75 * whole)
  monkeypatch.setenv(devices.GPU_SHARE_VARIABLE, '0.9')
  assert devices.DEVICES['h100'].memory_bytes == int(0.9 * whole)
  assert devices.DEVICES['v5e'].memory_bytes == 15.75 * 2**30


def test_larger_ones_have_more_devices():
  for name in ('v5e:2x4', 'v5p:4x4x4', 'h100:1x1', 'h100:8x2', 'cpu:8'):
    topology = devices.parse(name)
    counts = [one.count for one in topology.larger()]
    assert counts == sorted(counts)
    assert all(count > topology.count for count in counts)
    assert bool(counts) == (topology.family != 'cpu')
