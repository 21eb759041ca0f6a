"""The one place that names concrete models."""

import copy
import dataclasses
import importlib
import math
from collections.abc import Collection
from typing import Any

import jax

from textgen_jax import axes, errors
from textgen_jax.models import attention, attention_kernels, base, depth, layers, lstm, recurrence_kernels, transformer

ModelConfig = transformer.TransformerConfig | lstm.LSTMConfig

# What a stored config calls each family.
CONFIGS: dict[str, type] = {'transformer': transformer.TransformerConfig, 'lstm': lstm.LSTMConfig}

DEFAULT = transformer.TransformerConfig

# Attention variants for `model.attention`: a subclass of `attention.Attention` each.
ATTENTIONS = {
  'softmax': 'textgen_jax.models.attention.Attention',
}

MAX_LAYERS = 1000

CHOICES: dict[str, Collection[str]] = {
  'position': ('rotary', 'learned'),
  'norm': ('rms', 'layer'),
  'activation': ('relu2', 'swiglu', 'gelu'),
  'attention': ATTENTIONS,
  'attention_kernel': attention_kernels.KERNELS,
  'recurrence_kernel': recurrence_kernels.KERNELS,
  'init': ('zero_residual', 'gpt2'),
  'remat': depth.REMAT,
  'dropout_mask': ('token', 'sequence'),
  'compute_dtype': ('auto', 'float32', 'bfloat16'),
}


def build(config: ModelConfig, vocab_size: int, context_length: int, constrain: base.Constrain = base.unconstrained) -> Any:
  """A model for `vocab_size` token ids, trained on `context_length` tokens at a time.

  Models with equal arguments are equal and hash alike, so they can be static arguments of `jax.jit`.
  """
  config = copy.deepcopy(config)  # the module's hash must not change under it
  if isinstance(config, lstm.LSTMConfig):
    return lstm.LSTM(config, vocab_size, context_length, constrain)
  module, name = ATTENTIONS[config.attention].rsplit('.', 1)
  attention_class = getattr(importlib.import_module(module), name)
  return transformer.Transformer(config, vocab_size, context_length, attention_class, constrain)


def carries(config: ModelConfig) -> bool:
  """Whether the model's state can be carried from batch to batch."""
  return isinstance(config, lstm.LSTMConfig)


def check(config: ModelConfig) -> None:
  """Raises UserError for a value that no model can be built with."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if field.name in CHOICES and value not in CHOICES[field.name]:
      raise errors.not_among(f'model.{field.name}', value, CHOICES[field.name])
    if field.name.endswith('dropout') and not 0 <= value < 1:
      raise errors.UserError(f'model.{field.name}={value!r} is not in [0, 1)')
  for name in ('dim', 'num_layers', 'vocab_multiple'):
    _at_least(config, name, 1)
  if config.num_layers > MAX_LAYERS:
    raise errors.UserError(f'model.num_layers={config.num_layers} is above {MAX_LAYERS}: each layer is traced by itself')
  if isinstance(config, lstm.LSTMConfig):
    if not math.isfinite(config.forget_bias):
      raise errors.UserError(f'model.forget_bias={config.forget_bias} is not a finite number')
    for name in ('activation_penalty', 'temporal_penalty'):
      if not (math.isfinite(getattr(config, name)) and getattr(config, name) >= 0):
        raise errors.UserError(f'model.{name}={getattr(config, name)} is not a finite number of at least 0')
    return
  _at_least(config, 'num_heads', 1)
  _at_least(config, 'num_kv_heads', 0)
  _at_least(config, 'hidden_dim', 0)
  if config.dim % config.num_heads:
    raise errors.UserError(f"model.dim={config.dim} isn't divisible by model.num_heads={config.num_heads}")
  if config.num_kv_heads and config.num_heads % config.num_kv_heads:
    raise errors.UserError(f"model.num_heads={config.num_heads} isn't divisible by model.num_kv_heads={config.num_kv_heads}")
  if config.position == 'rotary' and config.dim // config.num_heads % 2:
    width = config.dim // config.num_heads
    raise errors.UserError(
      f'model.dim={config.dim} over model.num_heads={config.num_heads} is {width} a head: rotary positions need an even number'
    )
  if not (math.isfinite(config.logit_softcap) and config.logit_softcap >= 0):
    raise errors.UserError(f'model.logit_softcap={config.logit_softcap} is not a finite number of at least 0')
  if not (math.isfinite(config.rope_theta) and config.rope_theta > 1):
    raise errors.UserError(f'model.rope_theta={config.rope_theta} is not a finite number above 1')


def check_kernel(model: Any, length: int, segmented: bool) -> None:
  """Raises UserError where `model.attention_kernel` or `model.recurrence_kernel` names a kernel that can't train the model here.

  Args:
    model: what `build` gives, for training.
    length: tokens a row.
    segmented: whether rows have several documents that don't see each other.
  """
  field = 'recurrence_kernel' if isinstance(model, lstm.LSTM) else 'attention_kernel'
  kernel = getattr(model.config, field)
  reason = '' if kernel in ('auto', 'plain') else obstacle(model, kernel, length, segmented)
  if reason:
    raise errors.UserError(f'model.{field}={kernel!r}: {reason}')


def obstacle(model: Any, kernel: str, length: int, segmented: bool) -> str:
  """Why a kernel can't train the model; empty where it can. Other arguments as above."""
  if isinstance(model, lstm.LSTM):
    return recurrence_kernels.obstacle(*_training_loop(model, length))
  call, how = _training_call(model, length, segmented)
  return attention_kernels.obstacle(kernel, *call, **how)


def kernel_of(model: Any, length: int, segmented: bool) -> str:
  """What `model.attention_kernel` or `model.recurrence_kernel` comes to in training. Arguments as above."""
  if isinstance(model, lstm.LSTM):
    return recurrence_kernels.choose(model.config.recurrence_kernel, *_training_loop(model, length))
  call, how = _training_call(model, length, segmented)
  return attention_kernels.choose(model.config.attention_kernel, *call, **how)


def _training_loop(model: lstm.LSTM, length: int) -> tuple[tuple[int, ...], None, base.Constrain]:
  """What a recurrence is given in training: the shape of its gates, no padding, and constrain."""
  rows = model.constrain.ways(axes.BATCH) if hasattr(model.constrain, 'ways') else 1
  return (length, rows, 4 * model.config.dim), None, model.constrain


def _training_call(model: transformer.Transformer, length: int, segmented: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
  """What a kernel is given in training, abstract: queries, keys, sight and constrain; dropout, and whether mathematics are a variant's."""
  c = model.config
  head_dim, dtype = c.dim // c.num_heads, layers.resolve_dtype(c.compute_dtype)
  rows = model.constrain.ways(axes.BATCH) if hasattr(model.constrain, 'ways') else 1
  q_BTHK = jax.ShapeDtypeStruct((rows, length, c.num_heads, head_dim), dtype)
  k_BGSK = jax.ShapeDtypeStruct((rows, c.num_kv_heads or c.num_heads, length, head_dim), dtype)
  sight = attention_kernels.Sight(model.window, jax.ShapeDtypeStruct((rows, length), 'int32') if segmented else None)
  changed = attention.has_own_mathematics(model.attention_class)
  return (q_BTHK, k_BGSK, sight, model.constrain), {'dropout': c.attention_dropout, 'changed': changed}


def _at_least(config: ModelConfig, name: str, low: int) -> None:
  if getattr(config, name) < low:
    raise errors.UserError(f'model.{name}={getattr(config, name)} is below {low}')
