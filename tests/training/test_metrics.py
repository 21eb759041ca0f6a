import json

import pytest

from textgen_jax.training import metrics

try:
  from tensorboard.backend.event_processing import event_accumulator
except ImportError:
  event_accumulator = None


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_cut_after_keeps_up_to_the_step(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  text = ''.join(json.dumps({'step': n, 'train/loss': n / 3}) + '\n' for n in (5, 10, 10, 15, 20))
  path.write_text(text)
  metrics.cut_after(path, 10)
  assert path.read_text() == ''.join(text.splitlines(keepends=True)[:3])  # to the byte
  metrics.cut_after(path, 0)
  assert path.read_text() == ''
  assert [p.name for p in tmp_path.iterdir()] == ['metrics.jsonl']


@pytest.mark.parametrize('torn', ['{"step": 10, "train/lo', '{', '{"step": 1', '{"step": 10, "train/loss": 2.'])
def test_cut_after_drops_a_torn_last_line(torn, tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 5, "train/loss": 3.0}\n' + torn)
  metrics.cut_after(path, 10)
  assert path.read_text() == '{"step": 5, "train/loss": 3.0}\n'


def test_cut_after_ends_a_whole_line_that_lacks_its_end(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 5}\n{"step": 10}')
  metrics.cut_after(path, 10)
  assert path.read_text() == '{"step": 5}\n{"step": 10}\n'


def test_cut_after_of_no_file(tmp_path):
  metrics.cut_after(tmp_path / 'metrics.jsonl', 3)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('value', 'written'), [(1.5, 1.5), (0, 0), (-2.0, -2.0), (float('nan'), None), (float('inf'), None), (float('-inf'), None)]
)
def test_jsonable(value, written):
  assert metrics.jsonable(value) == written


def test_writer_appends_and_goes_on_from_the_restored_step(tmp_path):
  first = metrics.Writer(tmp_path, 0)
  for step in (1, 2, 3):
    first.write(step, {'train/loss': 1.0 / step})
    assert lines(tmp_path / 'metrics.jsonl')[-1] == {'step': step, 'train/loss': 1.0 / step}  # at once, not at close
  first.close()
  second = metrics.Writer(tmp_path, 2)
  second.write(3, {'train/loss': 9.0})
  second.text(3, 'sample/temperature_1.0', 'a `sample`')
  second.close()
  assert [(line['step'], line['train/loss']) for line in lines(tmp_path / 'metrics.jsonl')] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_writer_takes_what_is_not_finite(tmp_path):
  writer = metrics.Writer(tmp_path, 0)
  writer.write(1, {'val/loss': metrics.jsonable(float('nan')), 'val/tokens': 7})
  writer.write(2, {'val/loss': metrics.jsonable(1.0), 'val/tokens': 7})
  writer.close()
  text = (tmp_path / 'metrics.jsonl').read_text()
  assert text.splitlines()[0] == '{"step": 1, "val/loss": null, "val/tokens": 7}'


@pytest.mark.skipif(event_accumulator is None, reason='reading event files needs tensorboard')
def test_tensorboard_shows_each_step_once_after_a_restart(tmp_path):
  for restored, steps in ((0, (1, 2, 3)), (2, (3, 4))):
    writer = metrics.Writer(tmp_path, restored)
    for step in steps:
      writer.write(step, {'train/loss': 10.0 * restored + step})
    writer.close()
  events = event_accumulator.EventAccumulator(str(tmp_path))
  events.Reload()
  assert [(event.step, event.value) for event in events.Scalars('train/loss')] == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)]
