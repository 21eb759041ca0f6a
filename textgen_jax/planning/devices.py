"""Accelerators as their makers describe them, and groups of them by name: v5e:16x16, v5p:8x8x8, h100:8x32 (GPUs a host x hosts), cpu:8."""

import contextlib
import dataclasses
import math
import os
import re

from textgen_jax import backend, errors
from textgen_jax.training import metrics

GPUS_A_HOST = (1, 2, 4, 8)
MOST_DEVICES = 65_536
NUMBER = '(0|[1-9][0-9]{0,4})'  # of devices; \d would take other scripts' digits too
# JAX takes this share of a GPU's memory, unless the variable says otherwise (docs.jax.dev, "GPU memory allocation").
GPU_SHARE, GPU_SHARE_VARIABLE = 0.75, 'XLA_PYTHON_CLIENT_MEM_FRACTION'


@dataclasses.dataclass(frozen=True)
class Device:
  """One accelerator. Bandwidths are in bytes/s and, between devices, in one direction: half of what data sheets add up."""

  kind: str  # cpu | gpu | tpu: what its programs are made for
  jax_name: str  # what JAX calls it, by which `metrics.PEAK_FLOPS` has its peak
  total_bytes: int | None  # of its memory, that programs can use
  memory_bandwidth: float | None
  link_bandwidth: float | None  # TPU: of one of its links; GPU: of all of its NVLinks together
  network_bandwidth: float | None = None  # GPU: its share of its host's network
  compute_capability: float = 0.0  # GPU: NVIDIA's
  slices: tuple[str, ...] = ()  # TPU: the shapes in which it is let
  wrap: int = 0  # TPU: an axis of a multiple of it is a ring, and has two links a chip; others are lines

  @property
  def flops(self) -> float | None:
    """Dense bfloat16 peak, FLOP/s."""
    return metrics.peak_of(self.jax_name)

  @property
  def memory_bytes(self) -> int | None:
    """What one process may take of its memory."""
    if self.total_bytes is None or self.kind != 'gpu':
      return self.total_bytes
    return int(self.total_bytes * _gpu_share())


def _gpu_share() -> float:
  text = os.environ.get(GPU_SHARE_VARIABLE, str(GPU_SHARE))
  try:
    share = float(text)
  except ValueError:
    share = -1.0
  if not 0 < share <= 1:
    raise errors.UserError(f'{GPU_SHARE_VARIABLE}={text!r} is not in (0, 1]')
  return share


_SQUARES = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16', '8x16x16', '16x16x16', '16x16x24')

DEVICES = {
  # docs.cloud.google.com/tpu/docs/v5e: 16 GB, 819 GB/s, 400 GB/s over 4 ports, both directions. XLA leaves programs 15.75 GiB.
  'v5e': Device('tpu', 'TPU v5e', int(15.75 * 2**30), 819e9, 50e9, slices=_SQUARES, wrap=16),
  # docs.cloud.google.com/tpu/docs/v5p: 95 GB, 2,765 GB/s, 1,200 GB/s over 6 ports, both directions.
  'v5p': Device('tpu', 'TPU v5p', 95 * 2**30, 2765e9, 100e9, slices=_CUBES, wrap=4),
  # docs.cloud.google.com/tpu/docs/v6e: 32 GB, 1,638 GB/s, 800 GB/s over 4 ports, both directions. XLA leaves programs 31.25 GiB.
  'v6e': Device('tpu', 'TPU v6e', int(31.25 * 2**30), 1638e9, 100e9, slices=_SQUARES, wrap=16),
  # NVIDIA A100 data sheet (SXM, 80 GB): 2,039 GB/s, NVLink 600 GB/s; DGX A100: a port of 200 Gb/s a GPU.
  'a100': Device('gpu', 'NVIDIA A100-SXM4-80GB', 80_000_000_000, 2039e9, 300e9, 25e9, 8.0),
  # NVIDIA H100 data sheet (SXM, 80 GB, of which XLA sees 79.1 GiB): 3.35 TB/s, NVLink 900 GB/s; DGX H100: a port of 400 Gb/s a GPU.
  'h100': Device('gpu', 'NVIDIA H100 80GB HBM3', 84_929_347_584, 3350e9, 450e9, 50e9, 9.0),
  # NVIDIA H200 data sheet (SXM, 141 GB): 4.8 TB/s, NVLink 900 GB/s; DGX H200: a port of 400 Gb/s a GPU.
  'h200': Device('gpu', 'NVIDIA H200', 141_000_000_000, 4800e9, 450e9, 50e9, 9.0),
  # Processes of a test: nothing of their memory and speed is known.
  'cpu': Device('cpu', 'cpu', None, None, None),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices of one kind, and how they stand to each other."""

  family: str  # a key of DEVICES
  sizes: tuple[int, ...]  # TPU: chips along each axis; GPU: a host, hosts; CPU: devices

  @property
  def name(self) -> str:
    return f'{self.family}:{"x".join(map(str, self.sizes))}'

  @property
  def device(self) -> Device:
    return DEVICES[self.family]

  @property
  def count(self) -> int:
    return math.prod(self.sizes)

  def target(self) -> contextlib.AbstractContextManager[None]:
    """What is traced within is for these devices."""
    return backend.target(self.device.kind, self.count, self.device.compute_capability)

  def bandwidth(self, stride: int, size: int) -> float | None:
    """Bytes/s into each of `size` devices that stand `stride` apart, all of whose links carry what they tell each other.

    On a TPU that is all of a chip's links, as though no other axis of the mesh used them at that time. Between GPU hosts it is the
    network ports of those of the group that share a host, as what one of them gets it can hand on by NVLink.
    """
    d = self.device
    if d.link_bandwidth is None:
      return None
    if d.kind == 'tpu':
      return d.link_bandwidth * sum(2 if length % d.wrap == 0 else min(1, length - 1) for length in self.sizes)
    together = min(size, max(1, self.sizes[0] // stride))  # in one host
    if together == size or d.network_bandwidth is None:
      return d.link_bandwidth
    return min(d.link_bandwidth, together * d.network_bandwidth)

  def larger(self) -> list['Topology']:
    """Those of more devices of this kind, the smallest first."""
    if self.device.kind == 'cpu':
      return []
    if self.device.kind == 'gpu':
      full = max(GPUS_A_HOST)
      hosts = [Topology(self.family, (full, 2**n)) for n in range(9)]
    else:
      hosts = [parse(f'{self.family}:{shape}') for shape in self.device.slices]
    return [one for one in hosts if one.count > self.count]


def parse(name: str) -> Topology:
  """The topology of that name; raises UserError for one that there isn't, with the nearest."""
  family, _, shape = name.partition(':')
  if family not in DEVICES:
    raise errors.not_among('topology', name, _examples())
  kind = DEVICES[family].kind
  if kind == 'tpu' and shape not in DEVICES[family].slices:
    raise errors.not_among('topology', name, [f'{family}:{one}' for one in DEVICES[family].slices])
  if kind == 'gpu' and not re.fullmatch(f'{NUMBER}x{NUMBER}', shape):
    raise errors.UserError(f'topology={name!r} is not {family}:GPUSxHOSTS, such as {family}:8x4')
  if kind == 'cpu' and not re.fullmatch(NUMBER, shape):
    raise errors.UserError(f'topology={name!r} is not cpu:DEVICES, such as cpu:8')
  sizes = tuple(map(int, shape.split('x')))
  if kind == 'gpu' and sizes[0] not in GPUS_A_HOST:
    raise errors.UserError(f'topology={name!r}: a host has {", ".join(map(str, GPUS_A_HOST))} GPUs, not {sizes[0]}')
  if not 1 <= math.prod(sizes) <= MOST_DEVICES:
    raise errors.UserError(f'topology={name!r} has {math.prod(sizes)} devices, not 1 to {MOST_DEVICES}')
  return Topology(family, sizes)


def _examples() -> list[str]:
  shapes = {'tpu': lambda d: d.slices[-1] if d.wrap == 16 else '8x8x8', 'gpu': lambda d: '8x1', 'cpu': lambda d: '8'}
  return [f'{family}:{shapes[device.kind](device)}' for family, device in DEVICES.items()]
