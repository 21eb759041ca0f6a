import contextlib
import dataclasses
import functools
import json
import math
import threading
import types

import conftest
import jax
import numpy as np
import pytest
import spiking

from textgen_jax import assembly, trainer
from textgen_jax import experiment as experiment_lib
from textgen_jax.tools import sweep, sweep_results, sweep_seeds
from textgen_jax.training import step

pytestmark = pytest.mark.usefixtures('quickly')


@pytest.fixture(scope='module')
def make(tmp_path_factory):
  """Tiny experiments with dropout; an LSTM carries its state."""
  settings = {'num_steps': 12, 'eval_every_steps': 5, 'accumulation_steps': 1, 'spike_policy': 'skip'}
  return functools.partial(spiking.experiment, tmp_path_factory.mktemp('text'), **settings)


def only(experiment):
  return [sweep_results.Combination({}, experiment)]


@pytest.mark.parametrize(('kind', 'eval_max_tokens'), [('transformer', 0), ('lstm', 150)])
def test_each_seed_is_what_train_makes_of_it(kind, eval_max_tokens, make, tmp_path, monkeypatch):
  """A thread each: to the bit. As one program: within rounding."""
  experiment = dataclasses.replace(make(kind, eval_max_tokens=eval_max_tokens), seed=3)
  score = trainer.train(dataclasses.replace(experiment, seed=4), tmp_path / 'run')
  lines = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
  name = 'val_prefix/loss' if eval_max_tokens else 'val/loss'
  curve = [(line['step'], line[name]) for line in lines if name in line]
  assert [step for step, _ in curve] == [5, 10, 12]

  monkeypatch.setattr(sweep_seeds, 'MOST_IN_ONE_PROGRAM_ON_CPU', 0)
  (apart,) = sweep.sweep(only(experiment), 2, tmp_path / 'apart')
  first, second = apart.runs
  assert (first.seed, second) == (3, sweep_results.Outcome(4, score.loss_nats, score.bits_per_byte, curve, None))
  assert abs(first.loss_nats - second.loss_nats) > 1e-3  # else any seed would do
  assert (second.curve[-1][1] == second.loss_nats) == (not eval_max_tokens)  # on a prefix it is another loss

  monkeypatch.setattr(sweep_seeds, 'MOST_IN_ONE_PROGRAM_ON_CPU', 10**6)
  monkeypatch.setattr(sweep_seeds, 'side_by_side', None)  # no thread is asked for
  (together,) = sweep.sweep(only(experiment), 2, tmp_path / 'together')
  for one, other in zip(apart.runs, together.runs, strict=True):
    assert (one.seed, [step for step, _ in one.curve]) == (other.seed, [step for step, _ in other.curve])
    values = [[run.loss_nats, run.bits_per_byte, *(loss for _, loss in run.curve)] for run in (one, other)]
    np.testing.assert_allclose(*values, rtol=0, atol=1e-5)


def argv(text_file, output, *more):
  return ['sweep', f'--config={conftest.CONFIGS}/debug.py', f'--output={output}', f'--config.data.path={text_file}', *conftest.TINY, *more]


def records_of(output):
  return [json.loads(line) for line in (output / 'results.jsonl').read_text().splitlines()]


@pytest.mark.parametrize('most_in_one_program', [0, 10**6])
def test_what_diverges_has_an_infinite_loss(most_in_one_program, text_file, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(sweep_seeds, 'MOST_IN_ONE_PROGRAM_ON_CPU', most_in_one_program)
  rate = ['--config.optimizer.peak_lr=1e30', '--config.optimizer.warmup_steps=0', '--config.training.max_skipped_steps=2']
  assert sweep.main(argv(text_file, tmp_path, '--seeds=2', *rate)) == 0
  assert capsys.readouterr().out.splitlines()[1].split()[:6] == ['2', 'inf', '(2', 'diverged)', '-', '-']
  (record,) = records_of(tmp_path)
  assert (record['val_loss_nats'], record['val_loss_nats_stderr'], record['best_step']) == (None, None, None)
  lost = {'loss_nats': None, 'bits_per_byte': None, 'curve': [], 'diverged_at_step': 3}  # the first step's update ruins it
  assert record['runs'] == [{'seed': seed, **lost} for seed in (0, 1)]
  assert record['trained_tokens'] == 2 * 3 * 4 * 16  # no step after that


def test_one_seed_of_a_program_diverges():
  training = experiment_lib.TrainingConfig(max_skipped_steps=2, log_every_steps=1, batch_size=4, sequence_length=8)
  parts = [types.SimpleNamespace(experiment=types.SimpleNamespace(training=training))] * 3
  told = []
  run = sweep_seeds._Run(parts, None, sweep_seeds.TOGETHER, types.SimpleNamespace(trained=lambda *what: told.append(what)), None)

  def look(done, losses, in_a_row):
    ones = np.ones(3, np.float32)
    run.look(done, {'loss': (np.array(losses, np.float32) * 4, 4 * ones), 'skipped_in_a_row': (np.array(in_a_row, np.float32), ones)})

  look(7, [1.0, 2.0, 6.0], [1, 1, 0])
  look(8, [1.0, math.nan, 6.0], [0, 2, 1])
  look(9, [1.0, 2.0, 6.0], [0, 0, 0])  # it may come back, but train.py would have ended
  assert run.diverged == [None, 8, None]
  assert told == [(3, 96, 3.0), (3, 96, 3.5), (3, 96, 3.5)]


class Fake:
  """Stands for training: a seed's loss is known, and what was trained is written down."""

  def __init__(self, monkeypatch):
    self.trained, self.interrupt_at = [], None
    monkeypatch.setattr(sweep_seeds, 'train', self.train)

  def train(self, parts, told):
    for one in parts:
      e = one.experiment
      place = e.optimizer.peak_lr, e.model.dropout, e.seed
      if place == self.interrupt_at:
        raise KeyboardInterrupt
      self.trained.append(place)
      told.trained(e.training.num_steps, 100, None)
      loss = 2 + 100 * abs(e.optimizer.peak_lr - 3e-3) + e.model.dropout + e.seed / 10
      yield [sweep_results.Outcome(e.seed, loss, loss / 2, [(3, loss - 1), (6, loss)], None)]


@pytest.fixture
def fake(monkeypatch):
  return Fake(monkeypatch)


GRID = ['--grid=optimizer.peak_lr=1e-3,3e-3,1e-3', '--grid=model.dropout=0,0.1']


def test_a_table_of_every_combination_by_mean_loss(fake, text_file, tmp_path, capsys):
  assert sweep.main(argv(text_file, tmp_path / 'new/folder', *GRID)) == 0
  places = [(rate, dropout) for rate in (1e-3, 3e-3) for dropout in (0.0, 0.1)]
  assert fake.trained == [(*place, seed) for place in places for seed in (0, 1, 2)]
  out = [line.split() for line in capsys.readouterr().out.splitlines()]
  assert out[0][:2] == ['model.dropout', 'optimizer.peak_lr']
  stderr = f'{math.sqrt(((0.1**2) * 2) / 2 / 3):.4f}'
  assert [line[:7] for line in out[1:]] == [
    [dropout, rate, '3', f'{loss:.4f}', stderr, f'{loss / 2:.4f}', '3']
    for dropout, rate, loss in [('0.0', '0.003', 2.1), ('0.1', '0.003', 2.2), ('0.0', '0.001', 2.3), ('0.1', '0.001', 2.4)]
  ]
  records = records_of(tmp_path / 'new/folder')
  assert [record['settings'] for record in records] == [{'optimizer.peak_lr': rate, 'model.dropout': dropout} for rate, dropout in places]
  seed, loss = records[0]['runs'][2], pytest.approx(2.4)
  assert seed == {'seed': 2, 'loss_nats': loss, 'bits_per_byte': pytest.approx(1.2), 'curve': seed['curve'], 'diverged_at_step': None}
  assert seed['curve'] == [[3, pytest.approx(1.4)], [6, loss]]
  assert all(record['trained_tokens'] == 300 and record['versions']['jax'] == jax.__version__ for record in records)
  table = (tmp_path / 'new/folder/results.md').read_text().splitlines()
  assert table[0].startswith('`python -m textgen_jax.tools.sweep --config=')
  assert [row.split(' | ')[3] for row in table[-4:]] == ['2.1000', '2.2000', '2.3000', '2.4000']


def test_a_sweep_goes_on_where_it_was(fake, text_file, tmp_path, capsys):
  grid = ['--grid=optimizer.peak_lr=1e-3,3e-3', '--seeds=2']
  fake.interrupt_at = (3e-3, 0.0, 1)
  assert sweep.main(argv(text_file, tmp_path, *grid)) == 130
  error = capsys.readouterr().err.splitlines()[-1]
  assert error == f'error: SIGINT: what is finished stands in {tmp_path}; the same command goes on from there'
  assert fake.trained == [(1e-3, 0.0, 0), (1e-3, 0.0, 1), (3e-3, 0.0, 0)]
  before = records_of(tmp_path)
  fake.interrupt_at = None
  assert sweep.main(argv(text_file, tmp_path, *grid)) == 0
  assert fake.trained[3:] == [(3e-3, 0.0, 1)]
  assert records_of(tmp_path)[:1] == before[:1]
  assert [[run['seed'] for run in record['runs']] for record in records_of(tmp_path)] == [[0, 1]] * 2
  finished = (tmp_path / 'results.jsonl').read_bytes()
  # Once more: nothing is trained, nothing is written, and the table is told again.
  capsys.readouterr()
  assert sweep.main(argv(text_file, tmp_path, *grid)) == 0
  assert len(capsys.readouterr().out.splitlines()) == 3
  assert ((tmp_path / 'results.jsonl').read_bytes(), len(fake.trained)) == (finished, 4)
  # Other seeds, another grid and another configuration: what isn't there yet is added.
  assert sweep.main(argv(text_file, tmp_path, *grid, '--config.seed=1')) == 0
  assert fake.trained[4:] == [(1e-3, 0.0, 2), (3e-3, 0.0, 2)]
  assert sweep.main(argv(text_file, tmp_path, '--grid=model.dropout=0,0.1', '--config.optimizer.peak_lr=3e-3', '--seeds=3')) == 0
  assert fake.trained[6:] == [(3e-3, 0.1, seed) for seed in (0, 1, 2)]
  assert [len(record['runs']) for record in records_of(tmp_path)] == [3, 3, 3]


def test_results_of_other_text_are_not_mixed(fake, text_file, tmp_path, capsys):
  path = tmp_path / 'tale.txt'
  path.write_text(text_file.read_text())
  assert sweep.main(argv(path, tmp_path / 'out')) == 0
  path.write_text(text_file.read_text() + 'and so home.\n')
  assert sweep.main(argv(path, tmp_path / 'out')) == 2
  assert 'results of these settings on other text' in capsys.readouterr().err
  assert len(fake.trained) == 3


@pytest.mark.parametrize(
  ('flags', 'said'),
  [
    (['--grid=model.dmi=8,16'], 'there is no field model.dmi; did you mean model.dim?'),
    (['--grid=optimizer.peak_lr=1e-3,high'], 'optimizer.peak_lr'),
    (['--grid=training.num_steps=6,6.5'], 'training.num_steps'),
    (['--grid=model.dim=16,18', '--grid=model.num_heads=2,3'], "model.dim=16 isn't divisible by model.num_heads=3"),
    (['--grid=training.sequence_length=16,100000'], 'training.sequence_length=100000'),
    (['--grid=model=8'], 'model is a group of fields'),
    (['--grid=model.kind=lstm'], 'model.kind is set by the config file'),
    (['--grid=model.dropout'], 'is not FIELD=VALUE,VALUE'),
    (['--grid=seed=0,1'], '--seeds'),
    (['--grid=sharding.cpu_devices=1,2'], 'would change nothing'),
    (['--grid=model.dropout=0', '--grid=model.dropout=0.1'], 'model.dropout is set twice'),
    (['--grid=model.dim=16,32'], 'model.dim is set twice'),
    (['--grid=model.dropout=0,0.1', '--gird=x'], 'did you mean --grid?'),
    (['--grid=optimizer.b1=' + ','.join(f'{n / 1001}' for n in range(1001))], '--grid has 1001 combinations'),
    (['--seeds=0'], '--seeds=0 is not in [1, 1000]'),
    (['--seeds=4000000000'], '--seeds=4000000000 is not in [1, 1000]'),
    (['--config.seed=4294967295', '--seeds=2'], 'seed=4294967296'),
    (['--config.training.spike_policy=rollback'], 'goes back to checkpoints'),
    (['--config.time_limit_minutes=5'], 'time_limit_minutes=5.0'),
    (['--output='], '--output is missing'),
    (['--output=FILE'], 'is a file'),
    (['--split=test'], 'there is no flag --split'),
  ],
)
def test_refuses_before_anything_trains(flags, said, fake, text_file, tmp_path, capsys):
  file = tmp_path / 'file'
  file.write_text('')
  given = argv(text_file, tmp_path / 'out', *(flag.replace('FILE', str(file)) for flag in flags))
  if any(flag.startswith('--grid=model.dim=16,18') for flag in flags):
    given.remove('--config.model.dim=16')
  if any(flag.startswith('--grid=training') for flag in flags):
    given = [flag for flag in given if not flag.startswith(('--config.training.num_steps', '--config.training.sequence_length'))]
  assert sweep.main(given) == 2
  out, err = capsys.readouterr()
  assert (out, len(err.splitlines()), fake.trained, (tmp_path / 'out').exists()) == ('', 1, [], False)
  assert said in err


def test_a_damaged_line_is_named(fake, text_file, tmp_path, capsys):
  assert sweep.main(argv(text_file, tmp_path)) == 0
  path = tmp_path / 'results.jsonl'
  path.write_text(path.read_text() + '{"settings": {}}\n')
  assert sweep.main(argv(text_file, tmp_path, '--seeds=4')) == 2
  assert f'{path}, line 2 is no record of a sweep' in capsys.readouterr().err


def record(*runs):
  return sweep_results.Record({}, None, '', list(runs), 1.0, 1, {}, {})


def outcome(loss, bits=None, curve=()):
  return sweep_results.Outcome(0, loss, bits, list(curve), None)


def test_ranks():
  few, many, diverged, worse = record(outcome(3.0, 1.5)), record(outcome(2.0, 2.5)), record(outcome(math.inf), outcome(1.0, 0.5)), None
  worse = record(outcome(math.inf), outcome(math.inf))
  assert sweep_results.ranked([worse, many, diverged, few]) == [few, many, diverged, worse]  # pieces of words are dearer, and fewer
  no_bits = record(outcome(2.5))
  assert sweep_results.ranked([few, no_bits, many]) == [many, no_bits, few]


def test_the_best_step_is_that_of_the_mean():
  one, other = outcome(2.0, 1.0, [(5, 4.0), (10, 3.0), (15, 3.5)]), outcome(2.0, 1.0, [(5, 4.0), (10, 3.9), (15, 3.2)])
  assert record(one, other).best_step == 15
  assert record(one, outcome(math.inf, None, [(5, 0.0)])).best_step == 10  # one that diverged later on doesn't count
  assert record(outcome(2.0)).best_step is None


def test_seeds_that_nobody_waits_for_end(make):
  """Leaving early, as after Ctrl-C, lets no thread train on."""
  experiment = make('lstm', num_steps=100_000, eval_every_steps=0)
  parts = [assembly.Parts(dataclasses.replace(experiment, seed=seed), None, step.no_hook) for seed in range(3)]
  with pytest.MonkeyPatch.context() as patch, contextlib.closing(sweep_seeds.Told(3 * 100_000)) as told:
    patch.setattr(sweep_seeds, 'MOST_IN_ONE_PROGRAM_ON_CPU', 0)

    def trained(self, steps, tokens, loss_nats):
      raise ZeroDivisionError

    patch.setattr(sweep_seeds.Told, 'trained', trained)
    with pytest.raises(ZeroDivisionError):
      list(sweep_seeds.train(parts, told))
  assert not [thread for thread in threading.enumerate() if thread.name.startswith(('seed', 'prefetch'))]
