"""A subword Transformer that learns to reply: turns of Shakespeare's scenes and of a chat bot, two to one, loss on replies alone.

  python train.py --config=configs/dialogue.py --workdir=runs/dialogue
  python sample.py --workdir=runs/dialogue --prompt=$'USER:\\nWhat is your name?\\n\\nBOT:\\n' --temperature=0.5

Cost: about three minutes on two CPU cores that multiply bfloat16. Score: 3.925 nats a token, 2.266 bits per byte of the val split's
replies. How its rates were chosen: docs/recipes.md.
"""

from textgen_jax import experiment
from textgen_jax.data import corpora
from textgen_jax.models import transformer
from textgen_jax.text import base
from textgen_jax.training import optimizer


def get_config() -> experiment.Experiment:
  return experiment.Experiment(
    data=corpora.DataConfig(mixture='shakespeare_turns:2,chatterbot:1', loss_on_replies=True),
    tokenizer=base.TokenizerConfig(kind='sentencepiece', vocab_size=2048),
    model=transformer.TransformerConfig(dim=128, num_layers=4, num_heads=4, dropout=0.1, attention_dropout=0.1),
    optimizer=optimizer.OptimizerConfig(
      kind='muon',
      peak_lr=0.01,
      final_lr=0.0,
      schedule='linear',
      warmup_steps=10,
      b1=0.8,
      b2=0.95,
      matrix_lr=0.02,
      matrix_momentum=0.9,
      embedding_lr_scale=10.0,
    ),
    training=experiment.TrainingConfig(
      num_steps=1500,
      batch_size=8,
      sequence_length=128,
      product_dtype='auto',
      windows='shuffled',
      mask_documents=True,
      eval_every_steps=500,
      checkpoint_every_steps=500,
      sample_prompt='USER:\nWhat is your name?\n\nBOT:\n',
      sample_tokens=60,
    ),
  )
