"""A Transformer of 0.4 B parameters that reads 32,768 tokens at a time, for four TPU v5e.

  python train.py --config=configs/long_32k.py --workdir=runs/long_32k --config.data.path='/data/books/*.txt.gz'

Score: none, nobody has trained it yet. `python -m textgen_jax.tools.plan --config=configs/long_32k.py --topology=v5e:2x2` says: 4.9 GiB of
15.75 on each (XLA, compiled without one: 5.0), and 21 s a step of 0.5 M tokens with products at half of the peak, 4.8 days; the masked
half of attention is counted, which the kernel skips.

The rotary base is that of Xiong et al. 2023, arXiv:2309.16039, section 2.1, whose models read as much; width and depth are
those of GPT-3's 350 M (Brown et al. 2020, arXiv:2005.14165, table 2.1), and so are rate and batch. It reads whole books: a
text of many short documents needs --config.training.mask_documents to be worth the length.
"""

from textgen_jax import experiment, sharding
from textgen_jax.data import corpora
from textgen_jax.models import transformer
from textgen_jax.text import base
from textgen_jax.training import optimizer


def get_config() -> experiment.Experiment:
  return experiment.Experiment(
    data=corpora.DataConfig(val_fraction=0.01),
    tokenizer=base.TokenizerConfig(kind='sentencepiece', vocab_size=32_000),
    model=transformer.TransformerConfig(
      dim=1024,
      num_layers=24,
      num_heads=8,
      hidden_dim=2816,
      activation='swiglu',
      rope_theta=500_000.0,
      remat='full',
      scan_layers=True,
    ),
    optimizer=optimizer.OptimizerConfig(peak_lr=3e-4, final_lr=3e-5, warmup_steps=1000, b2=0.95),
    sharding=sharding.ShardingConfig(data=1, fsdp=-1),
    training=experiment.TrainingConfig(
      num_steps=20_000,
      batch_size=16,
      accumulation_steps=4,
      sequence_length=32_768,
      eval_every_steps=500,
      eval_batch_size=4,
      eval_max_tokens=2_000_000,
      checkpoint_every_steps=500,
    ),
  )
