"""A Transformer of 1.1 B parameters in TinyLlama's sizes, for eight GPUs.

  python train.py --config=configs/modern_1b.py --workdir=runs/modern_1b --config.data.path='/data/text/*.jsonl.zst'

Score: none, nobody has trained it yet. `python -m textgen_jax.tools.plan --config=configs/modern_1b.py --topology=h100:8x1` says: 25.3 GiB
of the 59.3 that JAX takes of each GPU (XLA, compiled without one: 26.9), 3.9 s a step of 2 M tokens with products at half of
the peak, 2.2 days.

Sizes, rates and batch are TinyLlama's (Zhang et al. 2024, arXiv:2401.02385): 22 layers 2,048 wide, 4 groups of keys for 32
heads, 2 M tokens a step; it saw 3 T tokens, which are 1,430,000 steps.
"""

from textgen_jax import experiment, sharding
from textgen_jax.data import corpora
from textgen_jax.models import transformer
from textgen_jax.text import base
from textgen_jax.training import optimizer


def get_config() -> experiment.Experiment:
  return experiment.Experiment(
    data=corpora.DataConfig(val_fraction=0.005),
    tokenizer=base.TokenizerConfig(kind='sentencepiece', vocab_size=32_000),
    model=transformer.TransformerConfig(
      dim=2048,
      num_layers=22,
      num_heads=32,
      num_kv_heads=4,
      hidden_dim=5632,
      activation='swiglu',
      qk_norm=False,
    ),
    optimizer=optimizer.OptimizerConfig(peak_lr=4e-4, final_lr=4e-5, warmup_steps=2000, b2=0.95),
    sharding=sharding.ShardingConfig(data=1, fsdp=-1),
    training=experiment.TrainingConfig(
      num_steps=50_000,
      batch_size=1024,
      accumulation_steps=16,
      sequence_length=2048,
      eval_every_steps=1000,
      eval_max_tokens=4_000_000,
      checkpoint_every_steps=1000,
    ),
  )
