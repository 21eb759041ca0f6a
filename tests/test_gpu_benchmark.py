"""The accelerator's benchmark, in small: figures of a row agree with each other."""

import re

import gpu
import pytest


@pytest.mark.usefixtures('quickly')
def test_the_smallest_part_of_a_dry_run(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(gpu, 'DRY', gpu.DRY._replace(batches=()))  # generation has a test of its own, and a dozen programs to compile
  gpu.main(['--dry_run', '--models', 'lstm', '--repeats=2', f'--output={tmp_path}/table.md'])
  text = (tmp_path / 'table.md').read_text()
  assert text == capsys.readouterr().out
  rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines() if line.startswith('| lstm')]
  work = gpu.lstm_1024(dry_run=True)
  assert (work.config.dim, work.config.num_layers, work.rows, work.length) == (32, 2, 4, 16)
  flops = 6 * (2 * (32 + 32) * 4 * 32 + 257 * 32) * 4 * 16  # of four gates a layer, and of the table, on 64 tokens
  peak_flops = 1e12 * float(re.search(r'product of .*: (\S+) TFLOP/s', text)[1])
  assert [row[1] for row in rows[:3]] == list(work.ways)
  for row in rows[:3]:
    cells = dict(zip(gpu.FIELDS, row, strict=True))
    seconds = float(cells['ms a step']) / 1e3
    assert float(cells['tokens/s'].replace(',', '')) == pytest.approx(work.rows * work.length / seconds, rel=1e-3)
    assert float(cells['model TFLOP a step']) == pytest.approx(flops / 1e12, rel=1e-3)
    assert float(cells['MFU'].strip('%')) / 100 == pytest.approx(flops / seconds / peak_flops, rel=0.01, abs=1e-3)


def test_what_does_not_fit_is_tried_with_half_the_rows(monkeypatch):
  tried, said = [], []

  def fits(name, work, *args):
    tried.append(work.rows)
    if work.rows > 32:
      raise gpu.jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')

  monkeypatch.setattr(gpu, 'rows_of_table', fits)
  report = type('Told', (), {'say': lambda self, line: said.append(line)})()
  gpu.train('lstm', gpu.lstm_1024(dry_run=False), 1e12, 1, gpu.FULL, gpu.Clock(1), report)
  assert tried == [128, 64, 32]
  assert ['128 rows do not fit' in said[0], '64 rows do not fit' in said[1]] == [True, True]
  gpu.train('lstm', gpu.lstm_1024(dry_run=False), 1e12, 1, gpu.FULL, gpu.Clock(-1), report)
  assert tried == [128, 64, 32]
  assert 'skipped for want of time' in said[-1]


def test_a_peers_row_counts_our_models_operations():
  work = gpu.lstm_1024(dry_run=True)
  assert gpu.peer_sizes(work) == (257, 4, 16, 32, 2, 0, 0.0)
  assert gpu.peer_sizes(gpu.nanogpt_10m(dry_run=False)) == (257, 64, 256, 384, 6, 6, 0.2)
  assert gpu.peer_sizes(gpu.gpt2_124m(dry_run=False)) == (50_304, 32, 1024, 768, 12, 12, 0.0)
  peer = {'model': 'lstm', 'way': 'theirs', 'ms': [3.0, 1.0, 2.0], 'gib': 1.5, 'first_s': 2.0}
  flops = 6 * (2 * (32 + 32) * 4 * 32 + 257 * 32) * 4 * 16
  row = dict(zip(gpu.FIELDS, [cell.strip() for cell in gpu.peer_row(peer, work, 1e12).strip('|').split('|')], strict=True))
  assert (row['ms a step'], row['least to most'], row['tokens/s']) == ('2', '1 to 3', '32,000')
  assert float(row['MFU'].strip('%')) / 100 == pytest.approx(flops / 2e-3 / 1e12, abs=6e-4)


@pytest.mark.parametrize(
  ('more', 'message'),
  [
    (['--ways', 'autp'], "--ways 'autp' is none of"),
    (['--repeats=0'], '--repeats: 0 is below 1'),
    (['--batches', '-3'], '--batches: -3 is below 1'),
    (['--minutes=nan'], '--minutes: nan is not in (0, 1440]'),
    (['--minutes=-1'], '--minutes: -1 is not in (0, 1440]'),
    (['--output=/nowhere/x.md'], "--output='/nowhere/x.md': No such file or directory"),
  ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(more, message, capsys):
  with pytest.raises(SystemExit) as caught:
    gpu.main(['--dry_run', '--models', 'lstm', *more])
  assert message in capsys.readouterr().err + str(caught.value)


@pytest.mark.usefixtures('quickly')
def test_a_run_of_one_way_beside_pytorch(tmp_path, capsys, monkeypatch):
  pytest.importorskip('torch')
  monkeypatch.setattr(gpu, 'DRY', gpu.DRY._replace(turn_s=0.0))
  gpu.main(['--dry_run', '--models', 'lstm', '--ways', 'plain', '--batches', '--repeats=2', '--peers'])
  out = capsys.readouterr().out
  assert [line.split(' | ')[1].partition(' ')[0] for line in out.splitlines() if line.startswith('| lstm')] == ['plain', 'PyTorch']
  assert 'Generation' not in out
