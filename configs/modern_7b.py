"""A Transformer of 6.7 B parameters in Llama 2's sizes, for 256 TPU v5e.

  python train.py --config=configs/modern_7b.py --workdir=runs/modern_7b --config.data.path='/data/text/*.jsonl.zst'

Score: none, nobody has trained it yet. `python -m textgen_jax.tools.plan --config=configs/modern_7b.py --topology=v5e:16x16` says: 8.6 GiB
of 15.75 on each (XLA, compiled without one: 7.6), 10 s a step with products at half of the peak, 5.9 days.

Sizes, rates and batch are those of Llama 2's 7 B (Touvron et al. 2023, arXiv:2307.09288, section 2.2): 32 layers 4,096 wide,
4 M tokens a step; it saw 2 T tokens, which are 477,000 steps.
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
      dim=4096,
      num_layers=32,
      num_heads=32,
      hidden_dim=11_008,
      activation='swiglu',
      qk_norm=False,
      remat='full',
      scan_layers=True,
    ),
    optimizer=optimizer.OptimizerConfig(peak_lr=3e-4, final_lr=3e-5, warmup_steps=2000, b2=0.95, eps=1e-5),
    sharding=sharding.ShardingConfig(data=1, fsdp=-1),
    training=experiment.TrainingConfig(
      num_steps=50_000,
      batch_size=1024,
      sequence_length=4096,
      eval_every_steps=1000,
      eval_batch_size=256,
      eval_max_tokens=8_000_000,
      checkpoint_every_steps=500,
    ),
  )
