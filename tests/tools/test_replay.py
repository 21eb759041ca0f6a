import functools
import json
import os
import subprocess
import sys

import conftest
import jax.numpy as jnp
import numpy as np
import pytest
import spiking

from textgen_jax import backend, trainer
from textgen_jax.tools import replay
from textgen_jax.training import health

pytestmark = pytest.mark.usefixtures('quickly')


@pytest.fixture(scope='module')
def make(tmp_path_factory):
  return functools.partial(spiking.experiment, tmp_path_factory.mktemp('text'))


@pytest.fixture(scope='module', params=['transformer', 'lstm'])
def run(request, make, tmp_path_factory):
  """A workdir with checkpoints of steps 4, 8, 12 and 14."""
  workdir = tmp_path_factory.mktemp(request.param) / 'run'
  trainer.train(make(request.param, num_steps=14, checkpoint_every_steps=4, keep_every_steps=4, keep_checkpoints=1), workdir)
  assert sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir()) == [4, 8, 12, 14]
  return workdir


def logged(workdir, step):
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return next(line for line in lines if line['step'] == step and 'train/loss' in line)


def snapshot(directory):
  return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in directory.rglob('*')}


@pytest.mark.parametrize(('step', 'nearest'), [(1, 0), (4, 0), (5, 4), (11, 8), (14, 12)])
def test_a_step_is_what_was_logged_to_the_bit(step, nearest, run, capsys):
  before = snapshot(run)
  capsys.readouterr()
  assert replay.main(['replay', f'--workdir={run}', f'--step={step}', '--rows=0']) == 0
  first, *lines = map(json.loads, capsys.readouterr().out.splitlines())
  assert snapshot(run) == before
  told = logged(run, step)
  assert (first['step'], first['from_step'], first['batch'], first['applied'], first['differences']) == (step, nearest, step - 1, True, {})
  for name in ('loss', 'grad_norm', 'learning_rate'):
    assert first[name] == first['logged'][name] == told[f'train/{name}']
  # Tokens' losses make up the loss, and parameters' gradients the norm.
  rows = [line for line in lines if 'row' in line]
  losses, weights = (np.array([row[name] for row in rows], np.float64) for name in ('losses_nats', 'weights'))
  assert losses.shape == (4, 8)
  np.testing.assert_allclose((losses * weights).sum() / weights.sum(), first['loss'], rtol=1e-6)
  np.testing.assert_allclose(first['mean_of_token_losses'], first['loss'], rtol=1e-6)
  norms = [line['grad_norm'] for line in lines if 'parameter' in line]
  np.testing.assert_allclose(np.linalg.norm(norms), first['grad_norm'], rtol=1e-5)
  # It is the text, and no row twice.
  assert all(row['text'] in spiking.TEXT and len(row['tokens']) == 9 for row in rows)
  assert all(len(row['text']) == 9 and ''.join(row['pieces']) == row['text'] for row in rows[1:])  # a stream begins with no text
  assert len({tuple(row['losses_nats']) for row in rows}) == 4


def test_few_rows_are_shown_unless_more_are_asked_for(run):
  lines = list(replay.replay(run, 3, rows=2))
  assert [line['row'] for line in lines if 'row' in line] == [0, 1]


def test_a_log_that_differs_is_told(run, tmp_path, capsys):
  path = run / 'metrics.jsonl'
  text = path.read_text()
  loss = logged(run, 6)['train/loss']
  try:
    path.write_text(text.replace(str(loss), str(np.nextafter(np.float32(loss), np.float32(9)))))
    capsys.readouterr()
    assert replay.main(['replay', f'--workdir={run}', '--step=6']) == 1
  finally:
    path.write_text(text)
  out, err = capsys.readouterr()
  assert list(json.loads(out.splitlines()[0])['differences']) == ['loss']
  assert err.splitlines()[-1].startswith('error: step 6: train/loss was logged as ')


@pytest.mark.parametrize('kind', ['transformer', 'lstm'])
def test_products_of_bfloat16_are_replayed_where_the_cpu_multiplies_them(kind, make, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(backend, 'cpu_multiplies_bfloat16', lambda: True)
  trainer.train(make(kind, num_steps=5, product_dtype='auto'), tmp_path)
  first, *rest = replay.replay(tmp_path, 5)
  assert first['differences'] == {}
  # In float32 each token's loss and each parameter's gradient differ from this by about 1e-3.
  np.testing.assert_allclose(first['mean_of_token_losses'], first['loss'], rtol=1e-6)
  norms = [line['grad_norm'] for line in rest if 'parameter' in line]
  np.testing.assert_allclose(np.linalg.norm(norms), first['grad_norm'], rtol=1e-5)
  monkeypatch.setattr(backend, 'cpu_multiplies_bfloat16', lambda: False)
  capsys.readouterr()
  assert replay.main(['replay', f'--workdir={tmp_path}', '--step=5', '--rows=1']) == 1
  assert ' and products of float32: other bits may come of a run that had others' in capsys.readouterr().err


def test_a_run_on_two_devices_of_a_cpu_is_replayed_on_two(text_file, tmp_path):
  """By processes of their own: this one's devices are settled."""
  training = {'num_steps': 3, 'checkpoint_every_steps': 2, 'log_every_steps': 1}
  flags = ['--config.sharding.cpu_devices=2', *(f'--config.training.{name}={value}' for name, value in training.items())]
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  run = tmp_path / 'run'
  for command in (conftest.train_argv(run, text_file, *flags), ['-m', 'textgen_jax.tools.replay', f'--workdir={run}', '--step=3']):
    command = [sys.executable, *command]
    done = subprocess.run(command, cwd=conftest.CONFIGS.parent, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
  first = json.loads(done.stdout.splitlines()[0])
  assert (first['from_step'], first['differences']) == (2, {})


@pytest.mark.parametrize('policy', ['skip', 'rollback'])
def test_spikes_and_rollbacks_are_followed(policy, make, tmp_path, monkeypatch):
  spikes = spiking.plant(monkeypatch)
  spikes |= {20, 34}
  given = make(spike_policy=policy, checkpoint_every_steps=16)
  trainer.train(given, tmp_path)
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  jumps = [health.Jump(line['step'], line['rollback/data_offset']) for line in lines if 'rollback/data_offset' in line]
  assert len(jumps) == (2 if policy == 'rollback' else 0)
  for step in (9, 10, 21, 23, 45):
    first, *_ = replay.replay(tmp_path, step)
    assert (first['differences'], first['loss']) == ({}, logged(tmp_path, step)['train/loss'])
    assert first['batch'] == step - 1 + health.data_offset(jumps, step)
    assert (first['applied'], first['spike']) == ((False, True) if policy == 'skip' and step == 21 else (True, False))
  # What the log alone knows: no checkpoint but the first one is left.
  for kept in sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir()):
    (tmp_path / 'checkpoints' / str(kept)).rename(tmp_path / f'gone_{kept}')
  first, *_ = replay.replay(tmp_path, 23)
  assert (first['from_step'], first['differences']) == (0, {})


def test_a_step_that_was_skipped_is_diagnosed_with_the_parameters_it_had(make, tmp_path):
  def hook(inputs):
    return jnp.sqrt(0.0 * jnp.abs(inputs.hidden_BTD).sum()), {}

  trainer.train(make(num_steps=5, max_skipped_steps=6, log_every_steps=2), tmp_path)
  first, *_ = replay.replay(tmp_path, 4, hook)  # another hook than that of the run
  assert (first['applied'], first['grad_norm']) == (False, None)
  assert first['differences']['grad_norm'] == [logged(tmp_path, 4)['train/grad_norm'], None]
  assert first['diagnosis'].startswith("activations and loss are finite; the gradient of the loss hook's term is not")
  first, *_ = replay.replay(tmp_path, 3)
  assert (first['logged'], first['differences'], first['applied']) == (None, {}, True)  # it wasn't logged


@pytest.mark.parametrize(
  ('flags', 'said'),
  [
    ([], '--step is missing'),
    (['--step=0'], '--step=0 is not in [1, 14]'),
    (['--step=15'], '--step=15 is not in [1, 14]'),
    (['--step=3', '--rows=-1'], '--rows=-1 is below 0'),
    (['--step=3', '--workdir=/nowhere'], "workdir='/nowhere': there is no config.json"),
  ],
)
def test_refuses(flags, said, run, capsys):
  capsys.readouterr()
  assert replay.main(['replay', f'--workdir={run}', *flags]) == 2
  out, err = capsys.readouterr()
  assert (out, len(err.splitlines())) == ('', 1)
  assert said in err
