"""The plan beside a real state and a compiled program, on eight devices of a CPU."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent / 'on_devices.py'
TRANSFORMERS = ('transformer data', 'transformer fsdp', 'transformer all', 'transformer tensor')


@pytest.fixture(scope='module')
def found(tmp_path_factory):
  environment = {**os.environ, 'TEXTGEN_JAX_CACHE': str(tmp_path_factory.mktemp('cache')), 'PYTHONPATH': str(SCRIPT.parents[2])}
  done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, timeout=300, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('name', [*TRANSFORMERS, 'lstm both'])
def test_the_state_is_counted_exactly(name, found):
  assert found[name]['counted'] == found[name]['real']
  assert bool(found[name]['real']['carry']) == name.startswith('lstm')


def test_meshes_differ(found):
  assert len({found[name]['real']['params'] for name in TRANSFORMERS}) == 4


@pytest.mark.parametrize(
  ('mesh', 'planned', 'compiled'),
  [
    ('fsdp', {'all-gather', 'reduce-scatter', 'all-reduce'}, {'all-gather'}),
    ('tensor', {'all-reduce'}, {'all-reduce'}),
  ],
)
def test_collectives_are_of_the_kinds_that_are_planned(mesh, planned, compiled, found):
  """XLA's CPU backend sums where others scatter."""
  plan = found[f'transformer {mesh}']['plan']
  assert plan['code'] == 0
  assert {one['kind'] for one in plan['collectives']} == planned
  assert compiled <= set(plan['compiled']['collectives'])
  assert ('all-gather' in plan['compiled']['collectives']) >= (mesh == 'fsdp')
  assert plan['compiled']['peak_bytes'] > plan['bytes']['params'] + plan['bytes']['optimizer']
  assert plan['compiled']['involuntary_rematerializations'] == 0
  assert plan['time'] is None
