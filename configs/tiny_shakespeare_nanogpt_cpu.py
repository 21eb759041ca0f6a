"""nanoGPT's character model for CPUs: 4 layers, 128 wide, 64 long, batch 12, 2,000 steps, AdamW as published.

  python train.py --config=configs/tiny_shakespeare_nanogpt_cpu.py --workdir=runs/nanogpt_cpu

Sizes, batches, steps and optimizer are nanoGPT's; the blocks are this project's own
(rotary positions, RMSNorm, query/key norm, squared ReLU, zero-initialised outputs).
Cost: 2.3 minutes on two CPU cores. Score: 1.629 nats on the whole val split (nanoGPT's
README: 1.88). With GPT-2's blocks it is 1.903: --config.model.position=learned
--config.model.norm=layer --config.model.activation=gelu --config.model.qk_norm=False
--config.model.tied_embedding=True --config.model.init=gpt2.

Without the web, give the text yourself: --config.data.path=tinyshakespeare.txt is split alike.
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
    model=transformer.TransformerConfig(dim=128, num_layers=4, num_heads=4),
    optimizer=optimizer.OptimizerConfig(peak_lr=1e-3, final_lr=1e-4, warmup_steps=100, b2=0.99, weight_decay=0.1, clip_norm=1.0),
    training=experiment.TrainingConfig(
      num_steps=2000,
      batch_size=12,
      sequence_length=64,
      eval_every_steps=500,
      checkpoint_every_steps=500,
    ),
  )
