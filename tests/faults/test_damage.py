"""Damage to what lies on the disk: named, gone round, never used and never silent."""

import dataclasses
import itertools
import json
import random

import conftest
import fault_damage
import fault_runs
import numpy as np
import orbax.checkpoint as ocp
import pytest

import sample
import train
from textgen_jax import workdir as workdir_lib
from textgen_jax.tools import evaluate as evaluate_tool
from textgen_jax.training import checkpoints, evaluate, integrity

FLIPS = 40
READERS = {'sample': (sample.main, '--max_new_tokens=1'), 'evaluate': (evaluate_tool.main, '--split=val')}


@pytest.fixture(scope='module')
def made(tmp_path_factory, quickly):
  return fault_damage.make(tmp_path_factory.mktemp('damage'))


@pytest.fixture
def damaged(made):
  made.reset()
  return made


def snapshot(directory):
  return {str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in directory.rglob('*')}


def test_bit_flips(damaged):
  rng = random.Random(0)
  for n in range(FLIPS):
    damaged.reset()
    path = rng.choice(fault_damage.files(damaged.folder()))
    fault_damage.flip(path, rng)
    ways = (damaged.restoring, damaged.sampling, damaged.restoring, damaged.evaluating)
    if n % 10:
      assert ways[n % 4](path) == ''
    else:
      assert damaged.training(path) == ''
      fault_runs.assert_same_end(damaged.copy, damaged.whole)


@pytest.mark.parametrize('damage', [fault_damage.truncate, fault_damage.delete])
def test_every_file(damage, damaged):
  rng = random.Random(0)
  ways = itertools.cycle((damaged.restoring, damaged.sampling, damaged.restoring, damaged.evaluating))
  paths = fault_damage.files(damaged.folder())
  assert len(paths) > 10
  for path in paths:
    damaged.reset()
    damage(path, rng)
    assert next(ways)(path) == ''


def test_what_is_not_sealed_is_without_effect(damaged):
  for path in fault_damage.files(damaged.folder(), sealed=False):
    path.write_bytes(b'\xff not what it was')
  code, _, err = fault_damage.told(train.main, damaged.argv)
  assert (code, 'skipped' in err, 'going on from step 6 of' in err) == (0, False, True)
  for path in fault_damage.files(damaged.folder(), sealed=False):
    path.unlink()
  assert fault_damage.told(evaluate_tool.main, ['evaluate', f'--workdir={damaged.copy}'])[1] == damaged.whole_scores[6]


@pytest.mark.parametrize('reader', READERS)
def test_the_best_is_damaged(reader, damaged):
  for step, loss in zip(fault_damage.STEPS, (1.0, 2.0, 3.0), strict=True):
    integrity.write_sealed(damaged.folder(step) / checkpoints.SCORE, {'step': step, 'val_loss': loss})
  command, flag = READERS[reader]
  argv = [reader, f'--workdir={damaged.copy}', flag]
  assert workdir_lib.load(damaged.copy).step == 2
  path = next(path for path in fault_damage.files(damaged.folder(2)) if 'params/d/' in path.as_posix())
  fault_damage.flip(path, random.Random(0))
  code, _, err = fault_damage.told(command, argv)
  assert code == 0
  assert f'{damaged.folder(2)} is skipped: {path.relative_to(damaged.folder(2))} is damaged' in err
  assert workdir_lib.load(damaged.copy).step == 4  # the best of those that are whole
  code, out, err = fault_damage.told(command, [*argv, '--checkpoint=2'])  # asked for by its number: nothing else will do
  assert (code, out) == (4, '')
  assert err == f'error: {damaged.folder(2)}: {path.relative_to(damaged.folder(2))} is damaged: its SHA-256 is not the sealed one\n'


def test_all_are_damaged(damaged):
  for step in fault_damage.STEPS:
    path = max(fault_damage.files(damaged.folder(step)), key=lambda path: path.stat().st_size)
    fault_damage.flip(path, random.Random(0))
    if 'state/' in str(path):
      fault_damage.flip(next(path for path in fault_damage.files(damaged.folder(step)) if 'params/' in str(path)), random.Random(0))
  before = snapshot(damaged.copy)
  for command, argv in (
    (train.main, [*damaged.argv, '--config.training.num_steps=9']),
    *((command, [name, f'--workdir={damaged.copy}', flag]) for name, (command, flag) in READERS.items()),
  ):
    code, out, err = fault_damage.told(command, argv)
    assert (code, out) == (4, '')
    assert err.count(' is skipped: ') >= 3
    assert f'error: {damaged.copy}/checkpoints: none of its 3 checkpoints is good; 6: ' in err.splitlines()[-1]
    assert snapshot(damaged.copy) == before  # never a silent start from zero


def test_strangers_among_the_steps(damaged):
  folder = damaged.copy / 'checkpoints'
  (folder / '999').mkdir()
  (folder / '99').symlink_to('6')
  (folder / '8').write_text('a file where the next step is to be saved')
  for name, (command, flag) in READERS.items():
    code, _, err = fault_damage.told(command, [name, f'--workdir={damaged.copy}', flag, '--checkpoint=latest'])
    assert code == 0
    assert f'{folder}/999 is skipped: it has no manifest.json' in err
  code, _, err = fault_damage.told(train.main, [*damaged.argv, '--config.training.num_steps=8'])
  assert code == 0
  assert 'going on from step 6 of' in err
  for name in ('999', '99', '8'):
    assert f'{folder}/{name} was set aside as {name}.damaged' in err
  assert checkpoints.listed(folder) == [4, 6, 8]


def test_steps_of_other_formats(damaged):
  folder = damaged.copy / 'checkpoints'
  with ocp.StandardCheckpointer() as plain:
    plain.save(folder / '7', {'params': np.ones(3)})
  told = f'{folder}/7 is skipped: it has no manifest.json'
  code, _, err = fault_damage.told(train.main, damaged.argv)
  assert (code, told in err, 'going on from step 6 of' in err) == (0, True, True)
  conftest.change_about(damaged.copy, format=2)
  code, _, err = fault_damage.told(train.main, damaged.argv)
  assert code == 4
  assert err.splitlines()[-1].endswith('none of its 3 checkpoints is good; 6: it is of format 2, and this version reads 3')


def test_a_damaged_score_is_taken_again(damaged):
  path = damaged.folder() / checkpoints.SCORE
  fault_damage.flip(path, random.Random(0))
  assert workdir_lib.load(damaged.copy).step == 4
  code, _, err = fault_damage.told(train.main, damaged.argv)
  assert code == 0
  assert f'{path} is damaged (its last line is not the SHA-256 of the first): the step counts as one that was never evaluated' in err
  fault_runs.assert_same_end(damaged.copy, damaged.whole)


def test_torn_lines_of_the_log(damaged):
  path = damaged.copy / 'metrics.jsonl'
  garbage = b'\n{"step": 5, "tra\n\xff\xfe\n[1, 2]\n{"step": "x"}\n' + b'[' * 100_000 + b'\n{"step": 6, "train/loss": 0.1'
  path.write_bytes(path.read_bytes() + garbage)
  (damaged.folder() / integrity.MANIFEST).unlink()
  assert fault_damage.told(train.main, damaged.argv)[0] == 0
  fault_runs.assert_same_end(damaged.copy, damaged.whole)


@pytest.mark.parametrize('content', [None, b'', b'{"model": {"kind": "tran', b'\xff' * 99])
def test_the_checkpoint_guards_what_stands_beside_it(content, damaged):
  files = [damaged.copy / 'config.json', *(damaged.copy / 'tokenizer').iterdir()]
  for path in files:
    path.write_bytes(content) if content is not None else path.unlink()
  for name, (command, flag) in READERS.items():
    assert fault_damage.told(command, [name, f'--workdir={damaged.copy}', flag])[0] == 0
  (damaged.folder() / integrity.MANIFEST).unlink()
  assert fault_damage.told(train.main, damaged.argv)[0] == 0
  fault_runs.assert_same_end(damaged.copy, damaged.whole)
  for path in files:  # written anew
    assert path.read_bytes() == (damaged.whole / path.relative_to(damaged.copy)).read_bytes()


def other_leaves(kind, leaves):
  """What a step would say of its arrays, had another program written it."""
  name = 'params/embed/embedding'
  dtype, shape = leaves[name]
  return {
    'dim': leaves | {name: [dtype, [shape[0] * 2, *shape[1:]]]},
    'dtype': leaves | {name: ['bfloat16', shape]},
    'missing': {other: leaf for other, leaf in leaves.items() if other != name},
    'extra': leaves | {'params/more/kernel': leaves[name]},
    'all': {f'state/other_{n}': leaves[name] for n in range(40)},
  }[kind]


@pytest.mark.parametrize('kind', ['dim', 'dtype', 'missing', 'extra', 'all'])
def test_other_arrays_are_refused_in_a_few_lines(kind, damaged):
  about = json.loads((damaged.folder() / 'about' / 'metadata').read_bytes())
  conftest.change_about(damaged.copy, leaves=other_leaves(kind, about['leaves']))
  before = snapshot(damaged.copy)
  code, _, err = fault_damage.told(train.main, damaged.argv)
  assert code == 4
  assert [line for line in err.splitlines() if 'error' in line] == [err.splitlines()[-1]]
  assert err.splitlines()[-1].startswith('error: ')
  assert f'{damaged.folder().name} holds other arrays than this run has: ' in err.splitlines()[-1]
  parts = {'dim': 'float32 (34, 16) -> float32 (17, 16)', 'dtype': 'bfloat16 (', 'missing': 'none -> ', 'extra': ') -> none'}
  assert parts.get(kind, ' more') in err.splitlines()[-1]
  assert 'Traceback' not in err
  assert snapshot(damaged.copy) == before


def test_a_torn_compile_cache_is_compiled_anew(damaged):
  """As a killed process or a full disk leaves it."""
  (damaged.folder() / integrity.MANIFEST).unlink()
  files = [path for path in fault_damage.compile_cache() if path.stat().st_size > 1]
  assert len(files) > 3
  for path in files:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  assert fault_damage.told(train.main, damaged.argv)[0] == 0
  fault_runs.assert_same_end(damaged.copy, damaged.whole)
  for path in files:
    path.unlink(missing_ok=True)


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_an_evaluation_that_is_not_finite_is_never_the_best_and_evicts_none(bad, damaged, tmp_path, monkeypatch):
  original, calls = evaluate.evaluate, []

  def broken(*args, **kwargs):
    score = original(*args, **kwargs)
    calls.append(score)
    return score if len(calls) == 1 else dataclasses.replace(score, nll_sums=score.nll_sums * bad)

  monkeypatch.setattr(evaluate, 'evaluate', broken)
  argv = [*damaged.argv, f'--workdir={tmp_path}', '--config.training.num_steps=10', '--config.training.keep_checkpoints=1']
  code, _, _ = fault_damage.told(train.main, argv)
  assert (code, len(calls)) == (0, 5)
  assert checkpoints.listed(tmp_path / 'checkpoints') == [2, 10]
  assert workdir_lib.load(tmp_path).step == 2
  val = [line['val/loss'] for line in fault_runs.records(tmp_path) if 'val/loss' in line]
  assert val == [calls[0].loss_nats, None, None, None, None]
