"""A Transformer of 69 B parameters in Llama 2's sizes, for 512 TPU v5p.

  python train.py --config=configs/modern_70b.py --workdir=runs/modern_70b --config.data.path='/data/text/*.jsonl.zst'

Score: none, nobody has trained it yet. `python -m textgen_jax.tools.plan --config=configs/modern_70b.py --topology=v5p:8x8x8` says: 21 GiB
of 95 on each (XLA, compiled without one: 18), 21 s a step with products at half of the peak, 12 days.

Sizes, rates and batch are those of Llama 2's 70 B (Touvron et al. 2023, arXiv:2307.09288, section 2.2): 80 layers 8,192 wide,
8 groups of keys for 64 heads, 4 M tokens a step; it saw 2 T tokens, which are 477,000 steps.
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
      dim=8192,
      num_layers=80,
      num_heads=64,
      num_kv_heads=8,
      hidden_dim=28_672,
      activation='swiglu',
      qk_norm=False,
      remat='full',
      scan_layers=True,
    ),
    optimizer=optimizer.OptimizerConfig(peak_lr=1.5e-4, final_lr=1.5e-5, warmup_steps=2000, b2=0.95, eps=1e-5),
    sharding=sharding.ShardingConfig(data=1, fsdp=-1),
    training=experiment.TrainingConfig(
      num_steps=50_000,
      batch_size=1024,
      sequence_length=4096,
      eval_every_steps=1000,
      eval_batch_size=512,
      eval_max_tokens=8_000_000,
      checkpoint_every_steps=500,
    ),
  )
