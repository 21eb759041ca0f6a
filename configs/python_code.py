"""A byte Transformer on the Python standard library's own source, which needs no download.

  python train.py --config=configs/python_code.py --workdir=runs/python_code

Cost: 2.3 minutes on two CPU cores that multiply bfloat16. Score: 1.087 nats, 1.568 bits per byte on the
whole val split (30 files of Python 3.11.7's library; another version's differ). Rates: docs/recipes.md.
"""

from textgen_jax import experiment
from textgen_jax.data import corpora
from textgen_jax.models import transformer
from textgen_jax.text import base
from textgen_jax.training import optimizer


def get_config() -> experiment.Experiment:
  return experiment.Experiment(
    data=corpora.DataConfig(corpus='python_stdlib'),
    tokenizer=base.TokenizerConfig(kind='byte'),
    model=transformer.TransformerConfig(dim=128, num_layers=4, num_heads=4),
    optimizer=optimizer.OptimizerConfig(
      kind='muon',
      peak_lr=0.01,
      final_lr=0.0,
      schedule='linear',
      warmup_steps=10,
      b1=0.8,
      b2=0.95,
      matrix_lr=0.02,
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
      sample_prompt='def ',
      sample_tokens=200,
    ),
  )
