"""A character Transformer on 34 of Shakespeare's plays: rotary positions, RMSNorm, squared ReLU.

  python train.py --config=configs/shakespeare_char.py --workdir=runs/shakespeare

Cost: two minutes on two CPU cores that multiply bfloat16. Score: 1.531 nats, 2.209 bits per byte
on the whole val split (The Taming of the Shrew, Coriolanus). How its rates were chosen: docs/recipes.md.
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
    optimizer=optimizer.OptimizerConfig(
      kind='muon',
      peak_lr=0.01,
      final_lr=0.0,
      schedule='linear',
      warmup_steps=10,
      b1=0.8,
      b2=0.95,
      matrix_lr=0.03,
      matrix_momentum=0.9,
      embedding_lr_scale=10.0,
    ),
    training=experiment.TrainingConfig(
      num_steps=750,
      batch_size=8,
      sequence_length=256,
      product_dtype='auto',
      windows='shuffled',
      eval_every_steps=250,
      eval_max_tokens=50_000,
      checkpoint_every_steps=250,
      sample_tokens=150,
    ),
  )
