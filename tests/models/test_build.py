import dataclasses
import functools
import importlib
import math
import re

import jax
import numpy as np
import pytest

from textgen_jax import errors
from textgen_jax.models import attention, build, lstm, transformer

Transformer, LSTM = transformer.TransformerConfig, lstm.LSTMConfig


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    (Transformer(dim=30, num_heads=4), "model.dim=30 isn't divisible by model.num_heads=4"),
    (Transformer(dim=32, num_heads=8, num_kv_heads=3), "model.num_heads=8 isn't divisible by model.num_kv_heads=3"),
    (Transformer(dim=12, num_heads=4), 'model.dim=12 over model.num_heads=4 is 3 a head: rotary positions need an even number'),
    (Transformer(position='rotery'), "model.position='rotery' is none of rotary, learned; did you mean 'rotary'?"),
    (Transformer(norm='batch'), "model.norm='batch' is none of rms, layer"),
    (Transformer(activation='glu'), "model.activation='glu' is none of relu2, swiglu, gelu; did you mean"),
    (Transformer(attention='softmx'), "model.attention='softmx' is none of softmax; did you mean 'softmax'?"),
    (Transformer(init='gpt-2'), "model.init='gpt-2' is none of zero_residual, gpt2; did you mean 'gpt2'?"),
    (Transformer(remat='dot'), "model.remat='dot' is none of none, full, dots; did you mean 'dots'?"),
    (Transformer(compute_dtype='float16'), "model.compute_dtype='float16' is none of auto, float32, bfloat16"),
    (Transformer(dim=0), 'model.dim=0 is below 1'),
    (Transformer(num_layers=0), 'model.num_layers=0 is below 1'),
    (Transformer(num_heads=0), 'model.num_heads=0 is below 1'),
    (Transformer(num_kv_heads=-1), 'model.num_kv_heads=-1 is below 0'),
    (Transformer(hidden_dim=-8), 'model.hidden_dim=-8 is below 0'),
    (Transformer(vocab_multiple=0), 'model.vocab_multiple=0 is below 1'),
    (Transformer(dropout=1.0), 'model.dropout=1.0 is not in [0, 1)'),
    (Transformer(attention_dropout=1.5), 'model.attention_dropout=1.5 is not in [0, 1)'),
    (Transformer(dropout=math.nan), 'model.dropout=nan is not in [0, 1)'),
    (Transformer(logit_softcap=-1.0), 'model.logit_softcap=-1.0 is not a finite number of at least 0'),
    (Transformer(rope_theta=1.0), 'model.rope_theta=1.0 is not a finite number above 1'),
    (Transformer(rope_theta=math.inf), 'model.rope_theta=inf is not a finite number above 1'),
    (LSTM(dim=-1), 'model.dim=-1 is below 1'),
    (LSTM(num_layers=0), 'model.num_layers=0 is below 1'),
    (LSTM(vocab_multiple=0), 'model.vocab_multiple=0 is below 1'),
    (LSTM(dropout=-0.1), 'model.dropout=-0.1 is not in [0, 1)'),
    (LSTM(input_dropout=1.5), 'model.input_dropout=1.5 is not in [0, 1)'),
    (LSTM(recurrent_dropout=1.0), 'model.recurrent_dropout=1.0 is not in [0, 1)'),
    (LSTM(weight_dropout=1.0), 'model.weight_dropout=1.0 is not in [0, 1)'),
    (LSTM(embedding_dropout=-0.5), 'model.embedding_dropout=-0.5 is not in [0, 1)'),
    (LSTM(dropout_mask='sequense'), "model.dropout_mask='sequense' is none of token, sequence; did you mean 'sequence'?"),
    (LSTM(activation_penalty=-1.0), 'model.activation_penalty=-1.0 is not a finite number of at least 0'),
    (LSTM(temporal_penalty=math.inf), 'model.temporal_penalty=inf is not a finite number of at least 0'),
    (LSTM(forget_bias=math.nan), 'model.forget_bias=nan is not a finite number'),
    (LSTM(compute_dtype='fp32'), "model.compute_dtype='fp32' is none of auto, float32, bfloat16"),
  ],
)
def test_an_impossible_value_is_named(config, message):
  with pytest.raises(errors.UserError, match=re.escape(message)):
    build.check(config)


@pytest.mark.parametrize(
  'config',
  [
    *(cls() for cls in build.CONFIGS.values()),
    Transformer(dim=12, num_heads=4, position='learned'),  # an odd width a head
    *(
      cls(**{name: value})
      for cls in build.CONFIGS.values()
      for name, values in build.CHOICES.items()
      if name in cls.__dataclass_fields__
      for value in values
    ),
  ],
)
def test_possible_values_pass(config):
  build.check(config)


@pytest.mark.parametrize('config', [cls() for cls in build.CONFIGS.values()])
def test_a_model_keeps_its_own_copy_of_the_config(config):
  model = build.build(config, 11, 8)
  config.dim *= 2
  assert model.config.dim == config.dim // 2
  assert (model.vocab_size, model.context_length) == (11, 8)


def test_every_attention_in_the_table_exists():
  for name, path in build.ATTENTIONS.items():
    module, cls = path.rsplit('.', 1)
    assert issubclass(getattr(importlib.import_module(module), cls), attention.Attention), name


VARIANT = """
import jax
import jax.numpy as jnp
from textgen_jax.models import attention, layers


class TalkingHeads(attention.Attention):
  '''Heads mixed before and after the softmax (Shazeer et al. 2020, arXiv:2003.02436), off by one (a query may draw nothing).'''

  def mix(self, q_BTHK, k_BSGK, v_BSGK, mask_BTS, deterministic):
    heads = q_BTHK.shape[2]
    before_HH, after_HH = (self.param(name, jax.nn.initializers.normal(1.0), (heads, heads)) for name in ('before', 'after'))
    s_BHTS = jnp.einsum('BHTS,HI->BITS', self.scores(q_BTHK, k_BSGK, mask_BTS), before_HH)
    s_BHTS = jnp.where(mask_BTS[:, None], s_BHTS, layers.MASKED)
    p_BHTS = jax.nn.softmax(jnp.pad(s_BHTS, ((0, 0), (0, 0), (0, 0), (0, 1))), axis=-1)[..., :-1]
    return self.collect(jnp.einsum('BHTS,HI->BITS', p_BHTS, after_HH), v_BSGK, deterministic)
"""


def test_a_new_attention_is_a_subclass_and_a_line_in_the_table(monkeypatch, tmp_path, random_params):
  (tmp_path / 'talking_heads.py').write_text(VARIANT)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setitem(build.ATTENTIONS, 'talking_heads', 'talking_heads.TalkingHeads')
  config = Transformer(dim=16, num_layers=2, num_heads=4, num_kv_heads=2, attention='talking_heads', compute_dtype='float32')
  build.check(config)
  model = build.build(config, 11, 16)
  params = random_params(model)
  assert params['block_1']['attention']['before'].shape == (4, 4)
  tokens_BT = np.random.default_rng(0).integers(11, size=(2, 6))

  @functools.partial(jax.jit, static_argnums=0, compiler_options={'xla_backend_optimization_level': 0})
  def call(model, tokens_BT, cache=None, valid_BT=None):
    return model.apply({'params': params}, tokens_BT, cache, valid_BT)

  run = functools.partial(call, model)
  whole, _ = run(tokens_BT)
  plain, _ = call(build.build(dataclasses.replace(config, attention='softmax'), 11, 16), tokens_BT)
  assert np.abs(whole - plain).max() > 0.01
  changed_BT = tokens_BT.copy()
  changed_BT[:, 4:] = (tokens_BT[:, 4:] + 1) % 11
  np.testing.assert_allclose(run(changed_BT)[0][:, :4], whole[:, :4], rtol=0, atol=1e-6)
  valid_BT = np.array([[True] * 3, [False, True, True]])
  padded_BT = np.stack([tokens_BT[0], np.roll(tokens_BT[1], 1)])
  first, cache = run(padded_BT[:, :3], model.init_cache(2, 8), valid_BT)
  then, _ = run(padded_BT[:, 3:], cache)
  actual = np.concatenate([first, then], axis=1)
  np.testing.assert_allclose(actual[0], whole[0], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(actual[1, 1:], whole[1, :5], rtol=1e-5, atol=1e-5)
