"""nanoGPT's character model for a GPU, as published: 10.65 M parameters, 6 layers, 384 wide, GPT-2's blocks.

  python train.py --config=configs/tiny_shakespeare_nanogpt_gpu.py --workdir=runs/nanogpt_gpu

83 s on one H200, start and samples included. Score: 1.4641 nats on the whole val split, at
step 1,750 (benchmarks/results/2026-11-28-h200.md); nanoGPT's README says 1.4697. It overfits
later: the best checkpoint by val loss is kept beside the latest, and sample.py takes the best. Without the web, give the
text yourself: --config.data.path=tinyshakespeare.txt is split alike.
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
    model=transformer.TransformerConfig(
      dim=384,
      num_layers=6,
      num_heads=6,
      position='learned',
      norm='layer',
      activation='gelu',
      qk_norm=False,
      tied_embedding=True,
      init='gpt2',
      dropout=0.2,
      attention_dropout=0.2,
    ),
    optimizer=optimizer.OptimizerConfig(peak_lr=1e-3, final_lr=1e-4, warmup_steps=100, b2=0.99, weight_decay=0.1, clip_norm=1.0),
    training=experiment.TrainingConfig(
      num_steps=5000,
      batch_size=64,
      sequence_length=256,
      eval_every_steps=250,
      checkpoint_every_steps=250,
    ),
  )
