"""The laws of DESIGN.md's contract, for every model family and style.

Expectations come from one plain call without cache or masks, whose own law is causality: a
document alone is the front of such a row, whatever follows it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from textgen_jax import axes, trees
from textgen_jax.models import base, build, lstm, transformer

VOCAB, CONTEXT, B, T = 29, 16, 3, 9
CHUNKS = [1, 3, T]  # through a cache
CALLS = [None, *CHUNKS]  # None: one call without a cache

SMALL = {'dim': 16, 'num_layers': 2, 'num_heads': 4, 'compute_dtype': 'float32'}
GPT2 = transformer.TransformerConfig(
  **SMALL, position='learned', norm='layer', activation='gelu', bias=True, tied_embedding=True, qk_norm=False, init='gpt2'
)
MODERN = transformer.TransformerConfig(**SMALL)
GROUPED = transformer.TransformerConfig(
  **SMALL, num_kv_heads=2, hidden_dim=24, activation='swiglu', remat='full', scan_layers=True, logit_softcap=5.0
)
TIED_LSTM = lstm.LSTMConfig(dim=12, num_layers=2, compute_dtype='float32')
UNTIED_LSTM = lstm.LSTMConfig(dim=12, num_layers=1, tied_embedding=False, compute_dtype='float32')
CONFIGS = {'gpt2': GPT2, 'modern': MODERN, 'swiglu_grouped_scanned': GROUPED, 'lstm_tied': TIED_LSTM, 'lstm_untied': UNTIED_LSTM}

every_config = pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
rotary_configs = pytest.mark.parametrize('config', [MODERN, GROUPED], ids=['modern', 'swiglu_grouped_scanned'])


# Compiles in a quarter of the time; nothing here runs for long.
quick_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def make(config, context_length=CONTEXT, **changes):
  return build.build(dataclasses.replace(config, **changes), VOCAB, context_length)


def forward(model, params, tokens_BT, cache=None, valid_BT=None, starts_BT=None):
  hidden_BTD, cache = model.apply({'params': params}, tokens_BT, cache, valid_BT, starts_BT)
  return model.apply({'params': params}, hidden_BTD, method='unembed'), cache


call = quick_jit(forward, static_argnums=0)


def read(model, params, tokens_BT, valid_BT=None, starts_BT=None, chunk=None, cache=None, slots=12):
  """Logits of all tokens: in one call without a cache, or in chunks through one."""
  if chunk is None:
    return np.asarray(call(model, params, tokens_BT, None, valid_BT, starts_BT)[0])
  cache = model.init_cache(len(tokens_BT), slots) if cache is None else cache
  return np.concatenate(feed(model, params, cache, tokens_BT, valid_BT, starts_BT, chunk)[0], axis=1)


def feed(model, params, cache, tokens_BT, valid_BT=None, starts_BT=None, chunk=3):
  """Each chunk's logits, and the cache after the last."""
  logits = []
  for low in range(0, tokens_BT.shape[1], chunk):
    part = np.s_[:, low : low + chunk]
    masks = [None if x is None else x[part] for x in (valid_BT, starts_BT)]
    logits_BTV, cache = call(model, params, tokens_BT[part], cache, *masks)
    logits.append(np.asarray(logits_BTV))
  return logits, cache


def alone(model, params, documents):
  """Logits of each document, read by itself from nothing."""
  rows = np.zeros((-(-len(documents) // B) * B, T), np.int32)
  for row, document in zip(rows, documents, strict=False):
    row[: len(document)] = document
  logits = np.concatenate([read(model, params, rows[low : low + B]) for low in range(0, len(rows), B)])
  return [line[: len(document)] for line, document in zip(logits, documents, strict=False)]


def assert_documents_alone(model, params, actual_BTV, tokens_BT, valid_BT=None, starts_BT=None):
  """The logits at every valid position are those of its document alone, invalid tokens taken out."""
  places = []  # of each document's tokens
  for b in range(len(tokens_BT)):
    places.append([])
    for t in range(tokens_BT.shape[1]):
      if valid_BT is not None and not valid_BT[b, t]:
        continue
      if starts_BT is not None and starts_BT[b, t]:
        places.append([])
      places[-1].append((b, t))
  places = [place for place in places if place]
  for place, expected in zip(places, alone(model, params, [[tokens_BT[at] for at in place] for place in places]), strict=True):
    assert_close(np.stack([actual_BTV[at] for at in place]), expected)


def assert_close(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-5)


def random_tokens(seed=0, shape=(B, T)):
  return np.random.default_rng(seed).integers(VOCAB, size=shape, dtype=np.int32)


def random_masks():
  """[B, T] each: holes anywhere, also first and last; a whole row; and left padding, as a batch of prompts has."""
  rng = np.random.default_rng(1)
  yield rng.random((B, T)) < 0.6
  yield np.array([[False] * T, [True] * T, [False] * 4 + [True] * 5])
  yield np.arange(T) >= np.array([[5], [0], [8]])


# Causality.


@every_config
def test_a_later_token_changes_nothing_before_it(config, random_params):
  model = make(config)
  params, tokens_BT = random_params(model), random_tokens()
  before = read(model, params, tokens_BT)
  for t in (1, 4, T - 1):
    changed_BT = tokens_BT.copy()
    changed_BT[:, t:] = (tokens_BT[:, t:] + 7) % VOCAB
    after = read(model, params, changed_BT)
    np.testing.assert_allclose(after[:, :t], before[:, :t], rtol=0, atol=1e-6)
    assert np.abs(after[:, t:] - before[:, t:]).max(axis=-1).min() > 1e-3


@every_config
def test_gradients_reach_exactly_the_row_s_own_past(config, random_params):
  model = make(config)
  params = random_params(model)
  tokens_BT = np.random.default_rng(0).permutation(VOCAB)[: B * T].reshape(B, T)  # all distinct: a place for each row of the table
  weights_D = np.random.default_rng(1).normal(size=config.dim)

  def outputs(table_VD):
    changed = {**params, 'embed': {'embedding': table_VD}}
    return model.apply({'params': changed}, tokens_BT)[0] @ weights_D

  slope = quick_jit(jax.jacrev(outputs))(params['embed']['embedding'])  # [B, T, V, D]
  touched = np.abs(slope).max(axis=-1)[:, :, tokens_BT] > 0  # [B, T, B, T]
  past = np.tril(np.ones((T, T), bool))
  expected = np.eye(B, dtype=bool)[:, None, :, None] & past[None, :, None, :]
  np.testing.assert_array_equal(touched, expected)


# The cache.


@every_config
@pytest.mark.parametrize('chunk', CHUNKS)
def test_chunks_through_a_cache_equal_one_call(config, chunk, random_params):
  model = make(config)
  params, tokens_BT = random_params(model), random_tokens()
  assert_close(read(model, params, tokens_BT, chunk=chunk), read(model, params, tokens_BT))


@every_config
@pytest.mark.parametrize('chunk', CALLS)
def test_an_invalid_token_leaves_no_trace(config, chunk, random_params):
  model = make(config)
  params, tokens_BT = random_params(model), random_tokens()
  no_starts_BT = np.zeros((B, T), bool) if chunk else None  # shares the next test's compiled programs, which take most of the time
  for valid_BT in random_masks():
    actual = read(model, params, tokens_BT, valid_BT, no_starts_BT, chunk)
    assert np.isfinite(actual).all()
    assert_documents_alone(model, params, actual, tokens_BT, valid_BT)


@every_config
@pytest.mark.parametrize('chunk', CALLS)
def test_a_document_after_a_start_equals_the_document_alone(config, chunk, random_params):
  model = make(config)
  params, tokens_BT = random_params(model), random_tokens()
  # Starts in the middle and at the borders of chunks of 3, side by side, at the first and the last token, and none.
  starts_BT = np.zeros((B, T), bool)
  starts_BT[0, [0, 2, 7]] = starts_BT[1, [3, 4, 8]] = True
  all_valid_BT = np.ones((B, T), bool) if chunk else None
  assert_documents_alone(model, params, read(model, params, tokens_BT, all_valid_BT, starts_BT, chunk), tokens_BT, None, starts_BT)


@every_config
@pytest.mark.parametrize('chunk', [None, 3])
def test_a_start_on_an_invalid_token_is_ignored(config, chunk, random_params):
  model = make(config)
  params, tokens_BT = random_params(model), random_tokens()
  starts_BT = np.random.default_rng(2).random((B, T)) < 0.4
  for valid_BT in random_masks():
    assert (starts_BT & ~valid_BT).any()
    actual = read(model, params, tokens_BT, valid_BT, starts_BT, chunk)
    assert_documents_alone(model, params, actual, tokens_BT, valid_BT, starts_BT)


@every_config
def test_a_row_in_a_batch_equals_the_row_alone(config, random_params):
  model = make(config)
  params, tokens_BT = random_params(model), random_tokens()
  valid_BT = next(random_masks())
  starts_BT = np.random.default_rng(2).random((B, T)) < 0.3
  together = read(model, params, tokens_BT, valid_BT, starts_BT, 3)
  for b in range(B):
    row = np.s_[b : b + 1]
    one = read(model, params, tokens_BT[row], valid_BT[row], starts_BT[row], 3)
    assert_close(one[0, valid_BT[b]], together[b, valid_BT[b]])


@every_config
def test_reordering_the_cache_equals_recomputing(config, random_params):
  model = make(config)
  params, prefix_BT = random_params(model), random_tokens(0, (B, 6))
  valid_BT = np.arange(6) >= np.array([[2], [0], [3]])
  _, cache = feed(model, params, model.init_cache(B, 12), prefix_BT, valid_BT)
  for rows_B in ([2, 0, 0], [1, 1, 1], [1, 2, 0]):
    new_BT = random_tokens(3, (B, 3))
    (actual,), _ = feed(model, params, base.reorder_cache(cache, np.array(rows_B)), new_BT)
    histories = [[*prefix_BT[r][valid_BT[r]], *new_BT[b]] for b, r in enumerate(rows_B)]
    assert_close(actual, [logits[-3:] for logits in alone(model, params, histories)])


@every_config
def test_a_grown_cache_keeps_its_content(config, random_params):
  model = make(config)
  params, tokens_BT = random_params(model), random_tokens()
  valid_BT = np.ones((B, T), bool)
  valid_BT[0, :2] = valid_BT[1, 4] = False
  first, cache = feed(model, params, model.init_cache(B, 6), tokens_BT[:, :6], valid_BT[:, :6])
  then, _ = feed(model, params, model.grow_cache(cache, 12), tokens_BT[:, 6:], valid_BT[:, 6:])
  assert_documents_alone(model, params, np.concatenate([*first, *then], axis=1), tokens_BT, valid_BT)


@every_config
@pytest.mark.parametrize('chunk', CHUNKS[1:])
def test_rewinding_equals_never_having_read(config, chunk, random_params):
  """Each row takes back another number of places, twice, invalid ones among them."""
  model = make(config)
  params, old_BT, new_BT = random_params(model), random_tokens(0, (B, 6)), random_tokens(5, (B, 4))
  valid_BT = np.ones((B, 6), bool)
  valid_BT[0, 4] = valid_BT[1, 2] = False
  for steps in ([0, 1, 3], [2, 0, 1], [3, 3, 3]):
    _, cache = feed(model, params, model.init_cache(B, 13, 3), old_BT, valid_BT, chunk=chunk)
    cache = jax.jit(model.rewind)(cache, np.array(steps))
    histories = [old_BT[b, : 6 - back][valid_BT[b, : 6 - back]] for b, back in enumerate(steps)]
    (actual,), cache = feed(model, params, cache, new_BT[:, :3])
    expected = alone(model, params, [[*old, *new[:3]] for old, new in zip(histories, new_BT, strict=True)])
    assert_close(actual, [logits[-3:] for logits in expected])
    (actual,), _ = feed(model, params, model.rewind(cache, np.array([3, 2, 3])), new_BT[:, 3:])
    kept = [[*old, *new[:size], new[3]] for old, new, size in zip(histories, new_BT, [0, 1, 0], strict=True)]
    assert_close(actual[:, 0], [logits[-1] for logits in alone(model, params, kept)])


@every_config
def test_rewinding_nothing_changes_nothing(config, random_params):
  model = make(config)
  _, cache = feed(model, random_params(model), model.init_cache(B, 12, 2), random_tokens())
  jax.tree.map(np.testing.assert_array_equal, model.rewind(cache, np.zeros(B, np.int32)), cache)


@rotary_configs
@pytest.mark.parametrize('ahead', [1, 3])
def test_a_ring_keeps_its_window_while_each_chunk_is_taken_back_in_part(config, ahead, random_params):
  """As speculation does: a row alone reads ahead + 1 tokens, and keeps from none to all of them."""
  window, time = 4, 16
  model = make(config, context_length=window)
  params, tokens_BT = random_params(model), random_tokens(0, (1, time))
  whole_TV = read(model, params, tokens_BT)[0]
  cache, done, rng = model.init_cache(1, window + ahead, ahead + 1), 0, np.random.default_rng(ahead)
  while done + ahead < time:
    kept = int(rng.integers(ahead + 2))
    guessed_T = random_tokens(done, (ahead + 1,))
    guessed_T[:kept] = tokens_BT[0, done : done + kept]
    (logits_BTV,), cache = feed(model, params, cache, guessed_T[None], chunk=ahead + 1)
    assert_close(logits_BTV[0, :kept], whole_TV[done : done + kept])
    cache, done = model.rewind(cache, np.array([ahead + 1 - kept])), done + kept


@every_config
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_every_cache_leaf_leads_with_the_batch_and_keeps_its_type(config, dtype, random_params):
  model = make(config, compute_dtype=dtype)
  cache = jax.eval_shape(lambda: model.init_cache(5, 7))
  rewound = jax.eval_shape(lambda: model.rewind(model.init_cache(5, 7, 2), jnp.zeros(5, jnp.int32)))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), rewound) == jax.tree.map(
    lambda x: (x.shape, x.dtype), jax.eval_shape(lambda: model.init_cache(5, 7, 2))
  )
  assert all(leaf.shape[0] == 5 for leaf in jax.tree.leaves([cache, rewound]))
  assert all(leaf.shape[0] == 5 for leaf in jax.tree.leaves(jax.eval_shape(lambda: model.grow_cache(model.init_cache(5, 7), 11))))
  params = random_params(model)
  for time in (1, 3):  # so that a cache can be the state of a compiled loop
    logits_BTV, after = jax.eval_shape(lambda cache, tokens: forward(model, params, tokens, cache), cache, np.zeros((5, time), np.int32))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), cache)
    assert logits_BTV.dtype == jnp.float32


@every_config
def test_a_fresh_cache_can_be_donated(config):
  pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(make(config).init_cache(B, 4, 2))]
  assert len(set(pointers)) == len(pointers)


# Past the trained context.


@rotary_configs
@pytest.mark.parametrize(('chunk', 'slots'), [(1, 4), (3, 6), (3, 14)])  # rings of window + chunk - 1, and room for all
def test_rotary_attention_goes_on_in_a_ring(config, chunk, slots, random_params):
  window, time = 4, 12
  model = make(config, context_length=window)
  params, tokens_BT = random_params(model), random_tokens(0, (B, time))
  whole = read(model, params, tokens_BT)
  assert not model.slides
  assert model.window == window
  # Rows of 12, 10 and 7 tokens that end together.
  pad_B = [0, 2, 5]
  padded_BT = np.stack([np.roll(row, pad) for row, pad in zip(tokens_BT, pad_B, strict=True)])
  valid_BT = np.arange(time) >= np.array(pad_B)[:, None]
  actual = read(model, params, padded_BT, valid_BT, chunk=chunk, slots=slots)
  for b, pad in enumerate(pad_B):
    assert_close(actual[b, pad:], whole[b, : time - pad])


@rotary_configs
def test_what_is_out_of_every_layer_s_window_is_not_seen(config, random_params):
  model = make(config, context_length=4)
  params, tokens_BT = random_params(model), random_tokens(0, (B, 12))
  seen = 1 + config.num_layers * (4 - 1)

  def last(forgotten):
    return read(model, params, np.where(np.arange(12) < forgotten, (tokens_BT + 7) % VOCAB, tokens_BT))[:, -1]

  assert_close(last(12 - seen), last(0))
  assert (np.abs(last(12 - seen + 1) - last(0)).max(axis=-1) > 1e-4).all()


def test_learned_positions_end_at_the_context(random_params):
  model = make(GPT2, context_length=4)
  params = random_params(model)
  assert model.slides
  call(model, params, random_tokens(0, (B, 4)))
  for cache in (None, model.init_cache(B, 8)):
    with pytest.raises(ValueError, match='5 tokens in one call, but learned positions end at 4'):
      call(model, params, random_tokens(0, (B, 5)), cache)


def test_learned_positions_past_the_context_are_never_silently_wrong(random_params):
  model = make(GPT2, context_length=4)
  params = random_params(model)
  logits = read(model, params, random_tokens(0, (B, 6)), chunk=2)
  assert np.isfinite(logits[:, :4]).all()
  assert np.isnan(logits[:, 4:]).all()
  # Unless a document starts there.
  starts_BT = np.tile(np.arange(6) == 2, (B, 1))
  logits = read(model, params, random_tokens(0, (B, 6)), None, starts_BT, chunk=2)
  assert_close(logits[:, 2:], read(model, params, random_tokens(0, (B, 6))[:, 2:]))


def test_an_lstm_goes_on(random_params):
  model = make(TIED_LSTM, context_length=3)
  params, tokens_BT = random_params(model), random_tokens()
  assert (model.slides, model.window) == (False, None)
  whole = read(model, params, tokens_BT)
  assert_close(read(model, params, tokens_BT, chunk=3, slots=0), whole)
  assert_close(read(make(TIED_LSTM), params, tokens_BT), whole)


# The vocabulary, dropout, identity.


@every_config
def test_padding_of_the_vocabulary_is_never_drawn(config, random_params):
  model = make(config, vocab_multiple=8)
  params, tokens_BT = random_params(model), random_tokens()
  assert params['embed']['embedding'].shape[0] == 32
  cut = {**params, 'embed': {'embedding': params['embed']['embedding'][:VOCAB]}}
  if not config.tied_embedding:
    cut['unembedding'] = {'kernel': params['unembedding']['kernel'][:, :VOCAB]}
  padded = read(model, params, tokens_BT)
  assert padded.shape == (B, T, 32)
  assert (padded[..., VOCAB:] == -np.inf).all()
  assert_close(padded[..., :VOCAB], read(make(config), cut, tokens_BT))


@functools.partial(quick_jit, static_argnums=0)
def draw(model, params, tokens_BT, key):
  return model.apply({'params': params}, tokens_BT, deterministic=False, rngs={'dropout': key})[0]


DROPOUTS = [
  *((config, 'dropout') for config in CONFIGS.values()),
  *((TIED_LSTM, name) for name in ('input_dropout', 'recurrent_dropout')),
]


dropouts = pytest.mark.parametrize(('config', 'name'), DROPOUTS, ids=[*CONFIGS, 'lstm_input', 'lstm_recurrent'])

# One mask a batch: rows share it. And masks that may be alike where a token has few to look at.
OTHERS = [(TIED_LSTM, 'weight_dropout'), (TIED_LSTM, 'embedding_dropout'), (transformer.TransformerConfig(), 'attention_dropout')]

every_dropout = pytest.mark.parametrize(
  ('config', 'name'), [*DROPOUTS, *OTHERS], ids=[*CONFIGS, 'lstm_input', 'lstm_recurrent', 'lstm_weight', 'lstm_embedding', 'attention']
)


@dropouts
def test_dropout_draws_by_key_and_row(config, name, random_params):
  model = make(config, **{name: 0.3})
  params, tokens_BT = random_params(model), random_tokens()
  tokens_BT[1] = tokens_BT[0]
  a, again, b = (np.asarray(draw(model, params, tokens_BT, jax.random.key(seed, impl='rbg'))) for seed in (0, 0, 1))
  np.testing.assert_array_equal(a, again)
  for other in (b[0], a[1]):  # another key; the same tokens in another row
    assert np.abs(a[0] - other).max(axis=-1)[1:].min() > 1e-3


@every_dropout
def test_without_dropout_the_program_is_the_same(config, name, random_params):
  params, tokens_BT = random_params(make(config)), random_tokens()

  def program(dropout, **kwargs):
    model = make(config, **{name: dropout})
    return str(jax.make_jaxpr(lambda params: model.apply({'params': params}, tokens_BT, **kwargs))(params))

  plain = program(0.0)
  for same in (program(0.3), program(0.3, deterministic=True), program(0.0, deterministic=False)):
    assert same == plain
  assert program(0.3, deterministic=False, rngs={'dropout': jax.random.PRNGKey(0)}) != plain


@every_config
def test_equal_models_are_one_static_argument(config):
  own = dataclasses.replace(config)
  one, two = make(own), build.build(own, VOCAB, CONTEXT)
  own.dim *= 2  # a model doesn't change under its hash
  assert one == two
  assert hash(one) == hash(two)
  assert one != make(config, num_layers=5)
  assert one != make(config, context_length=CONTEXT + 1)
  traced = []

  @functools.partial(jax.jit, static_argnums=0)
  def size(model, x):
    traced.append(model)
    return x * model.config.dim

  assert size(one, 1) == size(two, 1) == config.dim
  assert len(traced) == 1


@every_config
def test_every_parameter_names_its_axes(config):
  model = make(config)
  boxed = jax.eval_shape(lambda: model.init(jax.random.PRNGKey(0), jnp.zeros((1, 2), jnp.int32), method='init_everything'))
  for leaf in jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned)):
    assert isinstance(leaf, nn.LogicallyPartitioned)
    assert len(leaf.names) == leaf.value.ndim
    assert set(leaf.names) <= {*axes.ALL, None}
    assert leaf.value.dtype == jnp.float32
  assert trees.count(nn.unbox(boxed)) > 0
