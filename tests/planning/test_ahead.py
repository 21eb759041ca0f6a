"""Compiling for what isn't here; most of it only where a compiler for it is installed."""

import importlib.util
import os

import pytest

from textgen_jax import errors
from textgen_jax.planning import ahead, devices, estimate

VOCAB = 257


@pytest.mark.parametrize(
  ('name', 'told'), [('v5e:2x2', r"pip install 'jax\[tpu\]=="), ('h100:8x1', 'pip install --no-deps jax-cuda13-pjrt==')]
)
def test_a_missing_compiler_is_named(name, told, monkeypatch):
  plugins = {kind: (f'no_such_package.{module}', packages) for kind, (module, packages) in ahead.PLUGINS.items()}
  monkeypatch.setattr(ahead, 'PLUGINS', plugins)
  with pytest.raises(errors.UserError, match=f'needs a compiler: {told}'):
    ahead.devices_of(devices.parse(name))


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed')
def test_a_step_compiles_for_a_tpu(make):
  topology = devices.parse('v5e:2x2')
  experiment = make(dim=256, num_layers=1, training={'sequence_length': 128})
  compiled = ahead.compile_step(experiment, VOCAB, topology)
  taken = estimate.make(experiment, VOCAB, topology).footprint
  assert taken.state < compiled.peak_bytes < 3 * taken.peak
  assert {'all-gather', 'all-reduce'} <= set(compiled.collectives)


def test_what_the_compiler_says_is_kept_from_the_terminal(capfd):
  with ahead._told() as lines:
    os.write(2, b'one\nInvoluntary full rematerialization of x\n')
  assert lines == ['one', 'Involuntary full rematerialization of x']
  assert capfd.readouterr().err == ''
