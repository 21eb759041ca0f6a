"""A tiny Transformer for trying things out: seconds on a CPU, and it writes nothing worth reading.

  python train.py --config=configs/debug.py --workdir=runs/debug

Cost: about ten seconds on two CPU cores. Score: 2.883 nats on the whole val split, after 100 steps.
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
    model=transformer.TransformerConfig(dim=32, num_layers=2, num_heads=2),
    optimizer=optimizer.OptimizerConfig(warmup_steps=10),
    training=experiment.TrainingConfig(
      num_steps=100,
      batch_size=8,
      sequence_length=32,
      eval_every_steps=50,
      eval_max_tokens=10_000,
      checkpoint_every_steps=50,
      sample_tokens=50,
    ),
  )
