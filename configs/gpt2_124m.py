"""GPT-2's smallest model: 124 M parameters, 12 layers, 768 wide, 1,024 tokens of context, for accelerators.

  python train.py --config=configs/gpt2_124m.py --workdir=runs/gpt2 --config.data.path='/data/text/*.txt'

The recipe is nanoGPT's: 491,520 tokens a step, 600,000 steps, here in micro-batches of 12
rows for one GPU; on eight, --config.training.accumulation_steps=5 gives each as many. The
text is read as bytes, and `vocab_multiple` pads the table to the 50,304 rows that it has
in nanoGPT, so that sizes and speeds can be compared; --config.model.vocab_multiple=128
saves the 38 M parameters that bytes don't need. Memory: 7.4 GiB as XLA plans it for an H100
(`python -m textgen_jax.tools.plan --config=configs/gpt2_124m.py --topology=h100:1x1 --compile`).
Speed: 540,000 tokens/s on one H200, in batches of 32 rows (benchmarks/results/2026-11-28-h200.md):
at that speed all steps would take 6.3 days. Score: not measured.
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
    model=transformer.TransformerConfig(
      dim=768,
      num_layers=12,
      num_heads=12,
      position='learned',
      norm='layer',
      activation='gelu',
      qk_norm=False,
      tied_embedding=True,
      init='gpt2',
      vocab_multiple=50_304,
    ),
    optimizer=optimizer.OptimizerConfig(peak_lr=6e-4, final_lr=6e-5, warmup_steps=2000, b2=0.95),
    training=experiment.TrainingConfig(
      num_steps=600_000,
      batch_size=480,
      accumulation_steps=40,
      sequence_length=1024,
      eval_every_steps=1000,
      eval_max_tokens=2_000_000,
      eval_batch_size=16,
      checkpoint_every_steps=1000,
    ),
  )
