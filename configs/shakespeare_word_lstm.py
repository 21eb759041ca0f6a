"""A word LSTM on 34 of Shakespeare's plays, its state carried from batch to batch.

  python train.py --config=configs/shakespeare_word_lstm.py --workdir=runs/shakespeare_word_lstm

Cost: two minutes on two CPU cores that multiply bfloat16. Score: 4.347 nats a token, 2.793 bits per byte on the whole val
split, of which 1.13 are the spelling of unknown words, names above all. The output table is its own: tied, it came to 5.887
nats with AdamW. How its rates were chosen: docs/recipes.md.
"""

from textgen_jax import experiment
from textgen_jax.data import corpora
from textgen_jax.models import lstm
from textgen_jax.text import base
from textgen_jax.training import optimizer


def get_config() -> experiment.Experiment:
  return experiment.Experiment(
    data=corpora.DataConfig(corpus='shakespeare'),
    tokenizer=base.TokenizerConfig(kind='word', coverage=0.97),
    model=lstm.LSTMConfig(dim=256, num_layers=1, tied_embedding=False, dropout=0.1),
    optimizer=optimizer.OptimizerConfig(
      kind='muon', peak_lr=6e-3, final_lr=1e-4, warmup_steps=50, b2=0.99, weight_decay=0.0, matrix_lr=0.02
    ),
    training=experiment.TrainingConfig(
      num_steps=794,
      batch_size=32,
      sequence_length=32,
      product_dtype='auto',
      windows='contiguous',
      eval_every_steps=400,
      eval_max_tokens=20_000,
      checkpoint_every_steps=400,
      sample_tokens=60,
    ),
  )
