"""A character Transformer on 3,759 folk tunes in ABC notation, each on its own: no tune sees another.

  python train.py --config=configs/tunes.py --workdir=runs/tunes
  python sample.py --workdir=runs/tunes --max_new_tokens=600 --temperature=0.8

Cost: about seven minutes on two CPU cores that multiply bfloat16. Score: 1.066 nats, 1.543 bits per byte on the whole val split.
How its rates were chosen: docs/recipes.md.
Of 200 tunes at temperature 0.8, 99.5% are valid ABC to music21 (benchmarks/music_validity.py).
"""

from textgen_jax import experiment
from textgen_jax.data import corpora
from textgen_jax.models import transformer
from textgen_jax.text import base
from textgen_jax.training import optimizer


def get_config() -> experiment.Experiment:
  return experiment.Experiment(
    data=corpora.DataConfig(corpus='tunes'),
    tokenizer=base.TokenizerConfig(kind='char'),
    model=transformer.TransformerConfig(dim=128, num_layers=4, num_heads=4, dropout=0.1, attention_dropout=0.1),
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
      num_steps=1500,
      batch_size=8,
      sequence_length=256,
      product_dtype='auto',
      windows='shuffled',
      mask_documents=True,
      eval_every_steps=500,
      checkpoint_every_steps=500,
      sample_tokens=400,
      sample_temperatures=(0.5, 0.8, 1.0),
    ),
  )
