"""A word Transformer on 34 of Shakespeare's plays: the words that make up 97% of the text, and one for all others.

  python train.py --config=configs/shakespeare_word.py --workdir=runs/shakespeare_word

Cost: 2.7 minutes on two CPU cores that multiply bfloat16. Score: 4.189 nats a token, 2.732 bits per byte on the whole val
split, of which 1.13 are the spelling of unknown words, names above all. How its rates were chosen: docs/recipes.md.
"""

from textgen_jax import experiment
from textgen_jax.data import corpora
from textgen_jax.models import transformer
from textgen_jax.text import base
from textgen_jax.training import optimizer


def get_config() -> experiment.Experiment:
  return experiment.Experiment(
    data=corpora.DataConfig(corpus='shakespeare'),
    tokenizer=base.TokenizerConfig(kind='word', coverage=0.97),
    model=transformer.TransformerConfig(dim=128, num_layers=4, num_heads=4, tied_embedding=True, dropout=0.1, attention_dropout=0.1),
    optimizer=optimizer.OptimizerConfig(kind='muon', peak_lr=3e-3, final_lr=1e-4, warmup_steps=100, b2=0.99, matrix_lr=0.02),
    training=experiment.TrainingConfig(
      num_steps=1168,
      batch_size=16,
      sequence_length=64,
      product_dtype='auto',
      eval_every_steps=400,
      eval_max_tokens=20_000,
      checkpoint_every_steps=400,
      sample_tokens=60,
    ),
  )
