"""A character Transformer on 34 of Shakespeare's plays: rotary positions, RMSNorm, squared ReLU.

  python train.py --config=configs/shakespeare_char.py --workdir=runs/shakespeare

Cost: 2.5 minutes on two CPU cores. Score: 1.644 nats, 2.372 bits per byte on the whole val
split (The Taming of the Shrew, Coriolanus).
"""

from textgen_jax import experiment
from textgen_jax.data import corpora
from textgen_jax.models import transformer
from textgen_jax.text import base
from textgen_jax.training import optimizer


def get_config() -> experiment.Experiment:
  return experiment.Experiment(
    data=corpora.DataConfig(corpus='shakespeare'),
    tokenizer=base.TokenizerConfig(kind='char'),
    model=transformer.TransformerConfig(dim=128, num_layers=4, num_heads=4),
    optimizer=optimizer.OptimizerConfig(peak_lr=3e-3, final_lr=1e-4, warmup_steps=100, b2=0.99),
    training=experiment.TrainingConfig(
      num_steps=1500,
      batch_size=8,
      sequence_length=128,
      product_dtype='auto',
      eval_every_steps=500,
      eval_max_tokens=50_000,
      checkpoint_every_steps=500,
      sample_tokens=150,
    ),
  )
