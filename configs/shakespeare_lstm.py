"""A character LSTM on 34 of Shakespeare's plays, its state carried from batch to batch.

  python train.py --config=configs/shakespeare_lstm.py --workdir=runs/shakespeare_lstm

Cost: 1.8 minutes on two CPU cores that multiply bfloat16. Score: 1.450 nats, 2.092 bits per byte on the
whole val split (The Taming of the Shrew, Coriolanus). How its sizes and rates were chosen: docs/recipes.md.
"""

from textgen_jax import experiment
from textgen_jax.data import corpora
from textgen_jax.models import lstm
from textgen_jax.text import base
from textgen_jax.training import optimizer


def get_config() -> experiment.Experiment:
  return experiment.Experiment(
    data=corpora.DataConfig(corpus='shakespeare'),
    tokenizer=base.TokenizerConfig(kind='char'),
    model=lstm.LSTMConfig(dim=256, num_layers=1),
    optimizer=optimizer.OptimizerConfig(
      kind='muon', peak_lr=0.012, final_lr=1e-4, warmup_steps=50, b2=0.99, weight_decay=0.0, matrix_lr=0.04
    ),
    training=experiment.TrainingConfig(
      num_steps=2600,
      batch_size=32,
      sequence_length=64,
      product_dtype='auto',
      windows='contiguous',
      eval_every_steps=1300,
      eval_max_tokens=50_000,
      checkpoint_every_steps=1300,
      sample_tokens=150,
    ),
  )
