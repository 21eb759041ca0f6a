"""A subword Transformer that learns to reply: turns of Shakespeare's scenes and of a chat bot, two to one, loss on replies alone.

  python train.py --config=configs/dialogue.py --workdir=runs/dialogue
  python sample.py --workdir=runs/dialogue --prompt=$'USER:\\nWhat is your name?\\n\\nBOT:\\n' --temperature=0.5

Cost: about four minutes on two CPU cores. Score: 4.005 nats a token, 2.312 bits per byte of the val split's replies.
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
    optimizer=optimizer.OptimizerConfig(peak_lr=3e-3, final_lr=1e-4, warmup_steps=100, b2=0.99),
    training=experiment.TrainingConfig(
      num_steps=1500,
      batch_size=8,
      sequence_length=128,
      product_dtype='auto',
      mask_documents=True,
      eval_every_steps=500,
      checkpoint_every_steps=500,
      sample_prompt='USER:\nWhat is your name?\n\nBOT:\n',
      sample_tokens=60,
    ),
  )
