"""To nanoGPT's CPU figure, 1.88 nats, in seconds: half its layers and Muon, 200 steps.

  python train.py --config=configs/tiny_shakespeare_fast.py --workdir=runs/fast

Two layers, 128 wide (0.41 M parameters), rotary positions, RMSNorm, query/key norm, squared ReLU; Muon for the matrices, and a table
of tokens that learns 30 times as fast as the output layer (docs/recipes.md). Cost: about 10 seconds of training on two CPU cores.
Score: 1.866 nats on the whole val split. Without the web, give the text yourself: --config.data.path=tinyshakespeare.txt is split alike.
"""

from textgen_jax import experiment
from textgen_jax.data import corpora
from textgen_jax.models import transformer
from textgen_jax.text import base
from textgen_jax.training import optimizer


def get_config() -> experiment.Experiment:
  return experiment.Experiment(
    data=corpora.DataConfig(corpus='tiny_shakespeare'),
    tokenizer=base.TokenizerConfig(kind='char'),
    model=transformer.TransformerConfig(dim=128, num_layers=2, num_heads=4),
    optimizer=optimizer.OptimizerConfig(
      kind='muon',
      peak_lr=0.01,
      final_lr=0.0,
      schedule='linear',
      warmup_steps=10,
      b1=0.8,
      b2=0.95,
      weight_decay=0.0,
      matrix_lr=0.06,
      matrix_momentum=0.9,
      embedding_lr_scale=30.0,
    ),
    training=experiment.TrainingConfig(
      num_steps=200,
      batch_size=16,
      sequence_length=64,
      product_dtype='auto',
      log_every_steps=20,
      eval_every_steps=0,
      checkpoint_every_steps=0,
      sample_every_steps=0,
    ),
  )
