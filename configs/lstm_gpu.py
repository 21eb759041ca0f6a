"""An LSTM of three layers, 1,840 wide, on bytes, its state carried from batch to batch, for one GPU.

  python train.py --config=configs/lstm_gpu.py --workdir=runs/lstm_gpu --config.data.path=/data/enwik8

Score: none, nobody has trained it yet. `python -m textgen_jax.tools.plan --config=configs/lstm_gpu.py --topology=h100:1x1`
says: 7.3 GiB (XLA, compiled without a GPU: 6.7), and 26 ms a step with products at half of the peak, 1.3 hours; that leaves
out how long 1,200 products a step, each of which waits for the one before, take to start, and takes the plain loop, not the kernel.

Width, depth, span and batch after Merity et al. 2018, arXiv:1803.08240, whose model of enwik8 these are but for its narrower
embedding: 200 characters at a time, 128 streams, Adam at 1e-3. 50 epochs of enwik8's 90 M bytes are 176,000 steps.
"""

from textgen_jax import experiment
from textgen_jax.data import corpora
from textgen_jax.models import lstm
from textgen_jax.text import base
from textgen_jax.training import optimizer


def get_config() -> experiment.Experiment:
  return experiment.Experiment(
    data=corpora.DataConfig(val_fraction=0.1),
    tokenizer=base.TokenizerConfig(kind='byte'),
    model=lstm.LSTMConfig(dim=1840, num_layers=3, dropout=0.1, weight_dropout=0.2),
    optimizer=optimizer.OptimizerConfig(peak_lr=1e-3, final_lr=1e-5, warmup_steps=500, b2=0.99, weight_decay=0.0),
    training=experiment.TrainingConfig(
      num_steps=176_000,
      batch_size=128,
      sequence_length=200,
      windows='contiguous',
      eval_every_steps=2000,
      eval_max_tokens=1_000_000,
      checkpoint_every_steps=2000,
    ),
  )
