"""Tiny runs whose loss can be made to spike at chosen places of the data."""

import numpy as np

from textgen_jax import experiment as experiment_lib
from textgen_jax.data import corpora, windows
from textgen_jax.models import lstm, transformer
from textgen_jax.training import health, optimizer

TEXT = 'She sells sea shells by the sea shore, and the shells she sells are sea shells. ' * 24
RARE = sorted(set(TEXT)).index(',')  # its id
NUM_STEPS = 45


def plant(monkeypatch):
  """A set of places whose batches lead to what hardly ever follows. Spikes are known after ten losses, among the last ten or so."""
  monkeypatch.setattr(health, 'FEWEST_LOSSES', 10)
  monkeypatch.setattr(health, 'WINDOW', 10)
  places = set()
  for kind in (windows.RandomWindows, windows.ShuffledWindows, windows.ContiguousStreams):

    def noisy(self, step, rows=windows.ALL_ROWS, original=kind.batch):
      batch = original(self, step, rows)
      return batch._replace(targets_BT=np.full_like(batch.targets_BT, RARE)) if step in places else batch

    monkeypatch.setattr(kind, 'batch', noisy)
  return places


def experiment(directory, kind='transformer', **training):
  """One whose text lies in `directory`."""
  path = directory / 'text.txt'
  path.write_text(TEXT)
  if kind == 'transformer':
    model = transformer.TransformerConfig(dim=16, num_layers=1, num_heads=2, dropout=0.1)
  else:
    model = lstm.LSTMConfig(dim=16, num_layers=1, dropout=0.1)
  settings = {
    'num_steps': NUM_STEPS,
    'batch_size': 4,
    'sequence_length': 8,
    'windows': 'contiguous' if kind == 'lstm' else 'random',
    'accumulation_steps': 2,
    'log_every_steps': 1,
    'eval_every_steps': 0,
    'checkpoint_every_steps': 8,
    'sample_tokens': 0,
    'spike_deviations': 2.5,
    'rollback_steps': 12,
  }
  return experiment_lib.Experiment(
    data=corpora.DataConfig(path=str(path)),
    model=model,
    optimizer=optimizer.OptimizerConfig(peak_lr=1e-2, warmup_steps=2, schedule_steps=NUM_STEPS),
    training=experiment_lib.TrainingConfig(**(settings | training)),
  )
