import json
import math
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from textgen_jax import axes, errors, sharding

SCRIPT = pathlib.Path(__file__).parent / 'train_on_devices.py'


@pytest.fixture(scope='module')
def found(tmp_path_factory):
  """What the script prints on 1, 2, 4 and 8 devices, and the metrics of the run that they hand on."""
  directory = tmp_path_factory.mktemp('devices')
  text = directory / 'text.txt'
  text.write_text('She sells sea shells by the sea shore. ' * 60)
  environment = {**os.environ, 'TEXTGEN_JAX_CACHE': str(directory / 'cache'), 'JAX_PLATFORMS': 'cpu'}
  results = {}
  for num_devices in (1, 2, 4, 8):
    command = [sys.executable, str(SCRIPT), str(num_devices), str(text), str(directory / 'run')]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    assert 'full rematerialization' not in process.stderr
    results[num_devices] = json.loads(process.stdout.splitlines()[-1])
  results['run'] = [json.loads(line) for line in (directory / 'run' / 'metrics.jsonl').read_text().splitlines()]
  return results


MESHES = [(2, '2x1'), (2, '1x2'), (4, '4x1'), (4, '1x4'), (4, '2x2'), (2, 'tensor')]


@pytest.mark.parametrize('kind', ['transformer', 'lstm'])
@pytest.mark.parametrize(('num_devices', 'mesh'), MESHES)
def test_every_mesh_trains_alike(kind, num_devices, mesh, found):
  losses = found[1][f'{kind} 1x1']['losses']
  assert losses[-1] < 0.95 * losses[0]  # there is something to get wrong
  np.testing.assert_allclose(found[num_devices][f'{kind} {mesh}']['losses'], losses, rtol=1e-5)


@pytest.mark.parametrize('kind', ['transformer', 'lstm'])
@pytest.mark.parametrize(('num_devices', 'mesh'), MESHES[:-1])
def test_every_mesh_scores_alike(kind, num_devices, mesh, found):
  expected, scores = found[1][f'{kind} 1x1']['scores'], found[num_devices][f'{kind} {mesh}']['scores']
  assert list(scores) == list(expected) == ['rows', 'overlapping', 'masked'] + ['carried'] * (kind == 'lstm')
  assert len({tuple(one) for one in expected.values()}) == len(expected)  # each way of reading has losses of its own
  for name, losses in scores.items():
    np.testing.assert_allclose(losses, expected[name], rtol=1e-6)


@pytest.mark.parametrize('num_devices', [2, 4])
def test_matrices_are_made_orthogonal_on_all_devices_alike(num_devices, found):
  losses = found[1]['muon']['losses']
  assert losses != found[1]['transformer 1x1']['losses']
  np.testing.assert_allclose(found[num_devices]['muon']['losses'], losses, rtol=1e-4)  # six turns of products magnify rounding


@pytest.mark.parametrize('kind', ['transformer', 'lstm'])
@pytest.mark.parametrize('num_devices', [2, 4])
def test_products_of_bfloat16_on_all_devices_alike(kind, num_devices, found):
  exact = found[1][f'{kind} 1x1']['losses']
  alone, losses = (found[n][f'rounded {kind}']['losses'] for n in (1, num_devices))
  assert alone != exact
  for others in (exact, alone):  # sums of another order round to the neighbour now and then, which training magnifies
    np.testing.assert_allclose(losses[:2], others[:2], rtol=3e-3)
    np.testing.assert_allclose(losses, others, rtol=5e-2)


@pytest.mark.parametrize('kind', ['transformer', 'deep lstm'])
@pytest.mark.parametrize('mesh', ['8x1x1', '2x4x1', '2x2x2', '1x1x8'])
def test_eight_devices_in_every_way(kind, mesh, found):
  result = found[8][f'wide {kind} {mesh}']
  np.testing.assert_allclose(result['losses'], found[1][f'wide {kind} 1x1x1']['losses'], rtol=1e-5)
  _, fsdp, tensor = map(int, mesh.split('x'))
  said = result['collectives']
  assert said['all-reduce'] > 0  # gradients, or what a row's devices add up
  assert (said['all-gather'] > 0) or fsdp == 1
  kernels = {name: parts for name, parts in splits(result['places'], 'params/').items() if name.endswith('kernel')}
  assert {math.prod(parts) for parts in kernels.values()} == {fsdp * tensor if kind == 'transformer' else fsdp}
  tables = splits(result['places'], 'params/embed')
  assert {tuple(parts) for parts in tables.values()} == {(tensor, fsdp)}


def test_a_loop_over_layers_gathers_one_at_a_time(found):
  result = found[8]['wide scanned 2x2x2']
  np.testing.assert_allclose(result['losses'], found[1]['wide scanned 1x1x1']['losses'], rtol=1e-5)
  gathered = [[int(size) for size in shape.split(',')] for shape in result['gathered']]
  assert any(len(shape) == 2 for shape in gathered)
  assert not any(shape[0] == 3 for shape in gathered)  # the layers; nothing else is 3 long


def test_rows_of_a_recurrence_s_layers_stay_where_they_are(found):
  """Time stands before them: flattened, each device would multiply the rows of all."""
  for sizes in ('8x1x1', '2x4x1', '2x2x2', '1x1x8'):
    result = found[8][f'wide deep lstm {sizes}']
    assert not [shape for shape in result['gathered'] if shape.count(',') == 2]


def test_few_rows_by_columns_on_all_devices_alike(found):
  np.testing.assert_allclose(found[2]['by columns']['losses'], found[1]['lstm 1x1']['losses'], rtol=1e-5)


@pytest.mark.parametrize('kind', ['transformer', 'deep lstm'])
def test_one_device_has_nobody_to_talk_to(kind, found):
  assert set(found[1][f'wide {kind} 1x1x1']['collectives'].values()) == {0}


def test_accumulation_on_a_mesh(found):
  np.testing.assert_allclose(found[2]['transformer 2x1 accumulated']['losses'], found[1]['transformer 1x1']['losses'], rtol=1e-5)


def test_a_kernel_on_each_device_s_own_rows(found):
  result = found[2]['split rows']
  assert result['ways'] == 2
  for split, whole in zip(result['split'], result['whole'], strict=True):
    assert np.abs(whole).max() > 0.1
    np.testing.assert_allclose(split, whole, rtol=1e-5, atol=1e-5)


def test_a_recurrence_on_each_device_s_own_rows(found):
  """The gradients of what all devices share are summed over them."""
  result = found[2]['split recurrence']
  assert len(result['split']) == 5
  for split, whole in zip(result['split'], result['whole'], strict=True):
    assert np.abs(whole).max() > 0.1
    np.testing.assert_allclose(split, whole, rtol=1e-5, atol=1e-5)


def test_chunks_of_logits_and_dispatches_of_several_steps_on_a_mesh(found):
  one, other = found[4]['transformer 2x2 in chunks and dispatches'], found[4]['transformer 2x2']
  np.testing.assert_allclose(one['losses'], other['losses'], rtol=1e-5)
  assert one['places'] == other['places']


def test_a_run_goes_on_with_another_number_of_devices(found):
  losses = {line['step']: line['train/loss'] for line in found['run'] if 'train/loss' in line}
  assert list(losses) == list(range(1, 21))  # 5 steps on one device, 5 more on two, 10 more on four
  np.testing.assert_allclose(list(losses.values()), found[1]['lstm 1x1']['losses'], rtol=1e-5)


def splits(places, prefix):
  """Into how many parts each axis of the arrays under `prefix` is split, by name."""
  return {name: [g // s for g, s in zip(*shapes, strict=True)] for name, shapes in places.items() if name.startswith(prefix)}


@pytest.mark.parametrize('kind', ['transformer', 'lstm'])
@pytest.mark.parametrize(('num_devices', 'mesh', 'ways'), [(2, '1x2', 2), (4, '1x4', 4), (4, '2x2', 2)])
def test_fsdp_splits_params_and_moments(kind, num_devices, mesh, ways, found):
  places = found[num_devices][f'{kind} {mesh}']['places']
  params = splits(places, 'params/')
  matrices = {name: parts for name, parts in params.items() if name.endswith(('kernel', 'embedding'))}
  assert {tuple(sorted(parts)) for parts in matrices.values()} == {(1, ways)}
  for moment in ('mu', 'nu'):
    of_moments = {name.split(f'/{moment}/')[1]: parts for name, parts in splits(places, 'opt_state/').items() if f'/{moment}/' in name}
    assert {f'params/{name}': parts for name, parts in of_moments.items()} == params
  if kind == 'lstm':  # rows of the carry lie over all devices
    assert {tuple(parts) for parts in splits(places, 'carry/').values()} == {(num_devices, 1, 1)}


@pytest.mark.parametrize('kind', ['transformer', 'lstm'])
def test_data_copies_params_and_splits_rows(kind, found):
  places = found[4][f'{kind} 4x1']['places']
  assert {max(parts, default=1) for parts in (splits(places, 'params/') | splits(places, 'opt_state/')).values()} == {1}
  assert {parts[0] for parts in splits(places, 'carry/').values()} == ({4} if kind == 'lstm' else set())


def test_tensor_rules_split_what_they_name(found):
  params = splits(found[2]['transformer tensor']['places'], 'params/')
  assert params['params/embed/embedding'] == [2, 1]
  assert params['params/block_0/mlp/up/kernel'] == [1, 2]
  assert params['params/block_0/mlp/down/kernel'] == [2, 1]
  assert params['params/block_0/attention/query/kernel'] == [1, 2]
  assert splits(found[2]['lstm tensor']['places'], 'params/')['params/layer_0/recurrent_kernel'] == [1, 2]


def test_what_does_not_fit_the_devices(found):
  assert {found[1]['errors'][name] for name in ('batch', 'micro-batch', 'param')} == {None}
  on_four = found[4]['errors']
  assert on_four['batch'] == "training.batch_size=6 isn't divisible by the 4 devices that rows are split over"
  assert on_four['micro-batch'].startswith("training.batch_size=8 / training.accumulation_steps=4 isn't divisible by the 4 devices")
  assert on_four['param'].startswith('parameter embed/embedding has an axis of 18, which 4 devices along')
  for num_devices in (1, 2, 4):
    advice = '; of a CPU train.py makes N where sharding.cpu_devices=N says so'
    told = f'sharding.data=3 x sharding.fsdp=1 x sharding.tensor=1 is not the number of devices, {num_devices}{advice}'
    assert found[num_devices]['errors']['sizes'] == told
    told = f"{num_devices} devices aren't divisible by sharding sizes data=-1, fsdp=3, tensor=1{advice}"
    assert found[num_devices]['errors']['rest'] == told


def test_no_devices_are_made_of_what_is_no_cpu():
  gpu = types.SimpleNamespace(platform='gpu')
  with pytest.raises(errors.UserError, match=r'is not the number of devices, 2$'):
    sharding.make_mesh(sharding.ShardingConfig(data=3), [gpu] * 2)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'data': 0}, r'sharding\.data=0 is neither -1 nor at least 1'),
    ({'fsdp': -2}, r'sharding\.fsdp=-2 is neither -1 nor at least 1'),
    ({'data': -1, 'fsdp': -1}, 'sharding.data=-1 and sharding.fsdp=-1: only one of them'),
    ({'data': 2, 'fsdp': -1, 'tensor': -1}, 'sharding.fsdp=-1 and sharding.tensor=-1: only one of them'),
    ({'tensor': 0}, r'sharding\.tensor=0 is neither -1 nor at least 1'),
    ({'rules': {}}, r"sharding\.rules\['batch'\] names '\(missing\)'"),
    *[
      ({'rules': {k: v for k, v in sharding.ShardingConfig().rules.items() if k != name}}, rf"sharding\.rules\['{name}'\]")
      for name in axes.ALL
    ],
    ({'rules': sharding.ShardingConfig().rules | {'mlp': ['model']}}, r"rules\['mlp'\] names 'model'.*data, fsdp, tensor"),
  ],
)
def test_check(changes, message):
  with pytest.raises(errors.UserError, match=message):
    sharding.check(sharding.ShardingConfig(**changes))


def test_a_parameter_whose_axis_has_no_rule():
  class Forked(nn.Module):
    @nn.compact
    def __call__(self):
      self.param('gate', nn.with_logical_partitioning(nn.initializers.zeros, ('experts', 'embed')), (4, 2))
      self.param('kernel', nn.with_logical_partitioning(nn.initializers.zeros, ('embed', 'mlp')), (4, 2))

  boxed = jax.eval_shape(lambda: Forked().init(jax.random.PRNGKey(0)))['params']
  config = sharding.ShardingConfig()
  mesh = sharding.make_mesh(config)
  with pytest.raises(errors.UserError, match=r'no rule for these axes of parameters: gate \(experts\)$'):
    sharding.param_shardings(boxed, config, mesh)
  config.rules['experts'] = []
  assert set(sharding.param_shardings(boxed, config, mesh)) == {'gate', 'kernel'}


def test_one_device_constrains_nothing():
  config = sharding.ShardingConfig()
  if jax.device_count() == 1:
    x = jnp.ones(3)
    assert sharding.make_constrain(config, sharding.make_mesh(config))(x, ('batch',)) is x


@pytest.mark.parametrize(
  ('rows', 'cores', 'changes', 'expected'),
  [
    (12, 2, {}, 2), (12, 8, {}, 6), (7, 4, {}, 1), (12, 5, {'fewest_rows': 12}, 1), (12, 2, {'data': 1}, 1), (12, 2, {'fsdp': 2}, 1),
    (12, 8, {'fewest_rows': 4}, 3), (12, 8, {'fewest_rows': 5}, 2), (12, 8, {'fewest_rows': 16}, 1),
    (64, 64, {}, 8), (7, 4, {'cpu_devices': 3}, 3), (12, 2, {'cpu_devices': 1}, 1),
  ],
)  # fmt: skip
def test_rows_are_split_over_as_many_cores_as_divide_them(monkeypatch, rows, cores, changes, expected):
  monkeypatch.setattr(sharding.os, 'sched_getaffinity', lambda _: set(range(cores)), raising=False)
  monkeypatch.setattr(sharding, '_quota', lambda: 99)
  fewest_rows = changes.pop('fewest_rows', 1)
  assert sharding.cpu_devices(sharding.ShardingConfig(**changes), rows, fewest_rows) == expected


@pytest.mark.parametrize(('told', 'cores'), [('200000 100000', 2), ('50000 100000', 1), ('max 100000', 8), ('', 8)])
def test_a_container_s_quota_counts(monkeypatch, tmp_path, told, cores):
  (tmp_path / 'cpu.max').write_text(told)
  assert sharding._quota(str(tmp_path / 'cpu.max')) == cores
  assert sharding._quota(str(tmp_path / 'none')) == sharding.MOST_CPU_DEVICES
  monkeypatch.setattr(sharding, '_quota', lambda: cores)
  monkeypatch.setattr(sharding.os, 'sched_getaffinity', lambda _: set(range(64)), raising=False)
  assert sharding.cpu_devices(sharding.ShardingConfig(), 64) == cores
