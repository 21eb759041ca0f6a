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
