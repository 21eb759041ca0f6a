import pytest

from textgen_jax import experiment as experiment_lib
from textgen_jax import sharding
from textgen_jax.models import lstm, transformer
from textgen_jax.text import base
from textgen_jax.training import optimizer


@pytest.fixture
def make():
  """An experiment on bytes; fields of the model are given by name."""

  def make(kind='transformer', data=1, fsdp=-1, tensor=1, kind_of_optimizer='adamw', training=(), **model):
    sizes = {'dim': 64, 'num_layers': 2, 'vocab_multiple': 8}
    config = transformer.TransformerConfig if kind == 'transformer' else lstm.LSTMConfig
    heads = {'num_heads': 4} if kind == 'transformer' else {}
    settings = {'batch_size': 16, 'sequence_length': 32, 'windows': 'random' if kind == 'transformer' else 'contiguous', 'num_steps': 10}
    return experiment_lib.resolve(
      experiment_lib.Experiment(
        tokenizer=base.TokenizerConfig(kind='byte'),
        model=config(**(sizes | heads | model)),
        optimizer=optimizer.OptimizerConfig(kind=kind_of_optimizer),
        sharding=sharding.ShardingConfig(data=data, fsdp=fsdp, tensor=tensor),
        training=experiment_lib.TrainingConfig(**(settings | dict(training))),
      )
    )

  return make
