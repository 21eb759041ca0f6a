import dataclasses
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from textgen_jax import errors
from textgen_jax.models import build, lstm, products, transformer
from textgen_jax.sampling import batch, decode, generate, params, reader, sampler
from textgen_jax.sampling import history as history_lib
from textgen_jax.sampling import knobs as knobs_lib
from textgen_jax.sampling import rows as rows_lib
from textgen_jax.text import base, byte, char, word

SEGMENT = reader.SEGMENT
ALPHABET = '\n abcdefghijk'
TOKENIZER = char.CharTokenizer.train(base.TokenizerConfig(), [ALPHABET])
CONTEXT = 12
PROMPTS = ['abc', 'k', 'hide a bad bee\nfed a fig']  # shorter than the context, one token, twice the context
LONGEST = 400

# Random models end a text now and then: most laws are about what goes on.
Settings = functools.partial(params.SamplingParams, temperature=0.8, max_new_tokens=40, stop_at_end=False)
Ending = functools.partial(Settings, stop_at_end=True)


class Subject:
  """A tiny model with random parameters, and its generation without a cache."""

  def __init__(self, config, vocab_size=TOKENIZER.vocab_size):
    self.model = build.build(config, vocab_size, CONTEXT)
    shapes = jax.eval_shape(
      functools.partial(self.model.init, method='init_everything'), jax.random.key(0), jnp.zeros((2, CONTEXT), jnp.int32)
    )
    # Every leaf, the output layers too, which begin as zeros.
    leaves, structure = jax.tree.flatten(nn.meta.unbox(shapes)['params'])
    rng = np.random.default_rng(0)
    self.params = structure.unflatten([jnp.asarray(rng.normal(scale=0.4, size=leaf.shape), leaf.dtype) for leaf in leaves])
    # Causal: what pads the end doesn't matter, and one shape serves every length.
    self.padded = CONTEXT if self.model.slides else LONGEST
    self.step = jax.jit(self._step, static_argnames='uses')

  def _step(self, params, tokens_BT, last, position_B, knobs, uses):
    hidden_BTD, _ = self.model.apply({'params': params}, tokens_BT)
    logits_BTV = self.model.apply({'params': params}, hidden_BTD, method='unembed')
    adjusted_BV = decode.adjust(logits_BTV[:, last], history_lib.History(position_B), knobs, uses, None)
    return decode.next_token(adjusted_BV, rows_lib.uniforms(knobs.key_B, position_B, 1)[:, 0], knobs, uses)[0]

  def generate(self, *args):
    return generate.generate(self.model, self.params, TOKENIZER, *args)

  def reference(self, prompt, settings, sample=0):
    """Ids by a full forward pass a token; learned positions read the last 3/4 of the context anew where it is full."""
    history, start = batch.prompt_ids(TOKENIZER, prompt), 0
    prompt_hash = np.frombuffer(hashlib.sha256(np.array(history, '<u4').tobytes()).digest()[:4], '<u4')
    keys = np.asarray(rows_lib.row_keys(np.array([settings.seed], np.uint32), prompt_hash, np.array([sample], np.uint32)))
    vocab = batch.vocab_of(self.model, self.params, TOKENIZER)
    uses = knobs_lib.Uses.of([settings], vocab)
    knobs = knobs_lib.Knobs.of([settings], keys, uses, vocab)
    for position in range(settings.max_new_tokens):
      if self.model.slides and len(history) - start > CONTEXT:
        start = len(history) - CONTEXT * 3 // 4
      seen = history[start:]
      tokens_BT = np.array([seen + [0] * (self.padded - len(seen))], np.int32)
      token_B = self.step(self.params, tokens_BT, len(seen) - 1, np.array([position], np.int32), knobs, uses)
      history.append(int(token_B[0]))
    return history[len(history) - settings.max_new_tokens :]


@functools.cache
def subject(name):
  tiny = functools.partial(transformer.TransformerConfig, dim=16, num_layers=2, num_heads=2, num_kv_heads=1)
  return Subject(
    {
      'rotary': lambda: tiny(vocab_multiple=8),
      'learned': lambda: tiny(position='learned', norm='layer', activation='gelu', bias=True),
      'lstm': lambda: lstm.LSTMConfig(dim=16, num_layers=2),
    }[name]()
  )


families = pytest.mark.parametrize('name', ['rotary', 'learned', 'lstm'])
GREEDY, DRAWN = Settings(temperature=0), Settings(seed=3)
FILTERED = Settings(seed=4, top_k=5, top_p=0.9, min_p=0.02)


@pytest.mark.parametrize(
  ('name', 'settings'),
  [(name, settings) for name in ('rotary', 'learned', 'lstm') for settings in (GREEDY, DRAWN)] + [('lstm', FILTERED)],
)
def test_the_cache_changes_nothing(name, settings):
  one = subject(name)
  completions = one.generate(PROMPTS, settings)
  for completion, prompt in zip(completions, PROMPTS, strict=True):
    assert completion.tokens == one.reference(prompt, settings)
    assert completion.text == TOKENIZER.decode(completion.tokens)
    assert (completion.prompt, completion.seed, completion.sample_index, completion.finish_reason) == (prompt, settings.seed, 0, 'length')
  if settings.temperature:
    assert all(len(set(completion.tokens)) > 4 for completion in completions)


@families
def test_prompts_longer_than_a_chunk(name):
  one = subject(name)
  prompt = 'abcdefghijk' * 30
  assert len(prompt) > reader.MAX_CHUNK
  settings = Settings(seed=1, max_new_tokens=5)
  for completion in one.generate([prompt, 'cab', 'k'], settings):
    assert completion.tokens == one.reference(completion.prompt, settings)


@families
def test_text_depends_on_neither_batch_nor_place(name):
  one = subject(name)
  settings = Settings(seed=9)
  together = one.generate(PROMPTS, settings)
  assert one.generate(PROMPTS[::-1], settings) == together[::-1]
  assert [one.generate([prompt], settings)[0] for prompt in PROMPTS] == together


@families
def test_every_row_has_its_own_settings(name):
  one = subject(name)
  rows = [
    Settings(temperature=0, max_new_tokens=3),
    Settings(temperature=1.3, seed=1, max_new_tokens=50),  # the only one left in the end
    Settings(seed=5, stop=('a', 'b')),
    Settings(min_p=0.3, temperature=2, max_new_tokens=0),
    Settings(top_k=2, seed=2, max_new_tokens=SEGMENT + 1),
  ]
  prompts = ['abc', 'k', PROMPTS[2], 'd', 'abc']
  if name != 'lstm':  # filters know nothing of the model, and each combination of them compiles
    rows, prompts = rows[:4], prompts[:4]
  together = one.generate(prompts, rows)
  assert [len(completion.tokens) for completion in together[:2]] == [3, 50]
  assert [len(completion.tokens) for completion in together[3:]] == [0, SEGMENT + 1][: len(rows) - 3]
  assert together[2].finish_reason == 'stop'
  assert together == [one.generate([prompt], row)[0] for prompt, row in zip(prompts, rows, strict=True)]


def test_samples_and_seeds_differ_and_repeat():
  one = subject('lstm')
  settings = Settings(num_samples=3, seed=1)
  first = one.generate(PROMPTS[:2], settings)
  assert [(c.prompt, c.sample_index) for c in first] == [(p, s) for p in PROMPTS[:2] for s in range(3)]
  assert len({c.text for c in first}) == 6
  assert one.generate(PROMPTS[:2], settings) == first
  assert one.generate(PROMPTS[:2], dataclasses.replace(settings, num_samples=1)) == first[::3]
  another = one.generate(PROMPTS[:2], dataclasses.replace(settings, seed=2))
  assert not {c.text for c in first} & {c.text for c in another}
  assert [c.tokens for c in first[:3]] == [one.reference(PROMPTS[0], settings, sample) for sample in range(3)]


@families
def test_lengths_at_the_borders_of_a_segment(name):
  one = subject(name)
  whole = one.generate(['abc'], Settings(max_new_tokens=2 * SEGMENT + 1))[0]
  assert len(whole.tokens) == 2 * SEGMENT + 1
  for length in (0, 1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT):
    cut = one.generate(['abc'], Settings(max_new_tokens=length))[0]
    assert cut.tokens == whole.tokens[:length]
    assert cut.text == TOKENIZER.decode(cut.tokens)
    assert cut.finish_reason == 'length'


@families
def test_the_size_of_segments_changes_no_text(name):
  one = subject(name)
  prompts = [batch.prompt_ids(TOKENIZER, prompt) for prompt in PROMPTS]
  rows = [Settings(), Settings(seed=1, max_new_tokens=11), Settings(temperature=0)]
  vocab = batch.vocab_of(one.model, one.params, TOKENIZER)

  def drawn(segment):
    texts = [[], [], []]
    for piece in sampler.Sampler(one.model, one.params, prompts, rows, [0, 1, 2], vocab, segment=segment):
      for row, new in piece.items():
        texts[row] += new.tokens
    return texts

  assert drawn(7) == drawn(SEGMENT)


@pytest.mark.parametrize(
  ('name', 'lengths', 'sizes'),
  [
    ('rotary', [5, 90, 3, 4], [4, 2, 2]),
    ('learned', [5, 90, 3, 4], None),  # segments end where a context is full
    ('lstm', [5, 90, 3, 5, 40, 90, 5], [7, 7, 2]),
    ('lstm', [5, 90, 3, 5, 40, 90, 5, 1], [8, 4, 2]),  # one finished row stays for a while
  ],
)
def test_finished_rows_are_let_go(name, lengths, sizes, monkeypatch):
  one = subject(name)
  rows = [Settings(seed=seed, max_new_tokens=length) for seed, length in enumerate(lengths)]
  seen = []
  real = decode.decode

  def recorded(model, params, cache, state, *args, **kwargs):
    seen.append(len(state.token_B))
    return real(model, params, cache, state, *args, **kwargs)

  monkeypatch.setattr(decode, 'decode', recorded)
  completions = one.generate(['abc'] * len(rows), rows)
  assert seen == sizes if sizes else (seen[0], seen[-1]) == (4, 2)
  assert [completion.tokens for completion in completions] == [one.reference('abc', row) for row in rows]


def test_the_ring_holds_the_window_while_a_chunk_is_written(monkeypatch):
  # One slot too few hides one token from each chunk's first query, and four layers carry that to the end of the prompt.
  one = Subject(transformer.TransformerConfig(dim=16, num_layers=4, num_heads=2))
  prompts = [TOKENIZER.decode(np.random.default_rng(size).integers(12, size=size)) for size in (37, 30, 5)]
  cached = []
  real = decode.decode

  @jax.jit
  def logits(params, tokens_BT, cache=None):
    hidden_BTD, _ = one.model.apply({'params': params}, tokens_BT, cache=cache)
    return one.model.apply({'params': params}, hidden_BTD, method='unembed')

  def recorded(model, params, cache, state, *args, **kwargs):
    cached.append(logits(params, state.token_B[:, None], cache)[:, 0])
    return real(model, params, cache, state, *args, **kwargs)

  monkeypatch.setattr(decode, 'decode', recorded)
  one.generate(prompts, Settings(max_new_tokens=1))
  for prompt, logits_V in zip(prompts, cached[0], strict=True):
    ids = TOKENIZER.encode(prompt)
    whole_BTV = logits(one.params, np.pad(ids, (0, 40 - len(ids)))[None])
    np.testing.assert_allclose(logits_V, whole_BTV[0, len(ids) - 1], atol=1e-4)


def test_an_empty_prompt_starts_a_document():
  one = subject('rotary')
  end = TOKENIZER.special_ids['end_of_text']
  assert batch.prompt_ids(TOKENIZER, '') == [end]
  assert end not in batch.prompt_ids(TOKENIZER, ALPHABET)
  for empty, other in (one.generate(['', 'k'], Settings()), one.generate(['', 'k'], Ending())):
    assert empty.prompt == ''
    assert empty.tokens == one.reference('', Settings())[: len(empty.tokens)]  # the reference's history begins with that id
    assert empty.tokens != other.tokens


def test_a_prompt_that_begins_a_document_follows_the_end_of_another():
  one, end = subject('lstm'), TOKENIZER.special_ids['end_of_text']
  assert batch.prompt_ids(TOKENIZER, 'abc', begins_document=True) == [end, *TOKENIZER.encode('abc')]
  assert batch.prompt_ids(TOKENIZER, '', begins_document=True) == [end]  # once
  begun, plain, empty, empty_begun = one.generate(
    ['abc', 'abc', '', ''], [Settings(begins_document=begins) for begins in (True, False, False, True)]
  )
  assert begun.tokens != plain.tokens
  assert empty.tokens == empty_begun.tokens
  assert begun.text == TOKENIZER.decode(begun.tokens)
  assert ''.join(generate.stream(one.model, one.params, TOKENIZER, 'abc', Settings(begins_document=True))) == begun.text


def test_no_prompts_no_completions():
  assert subject('lstm').generate([], Settings()) == []
  assert subject('lstm').generate([], []) == []


def test_long_texts_are_drawn_in_a_loop_that_knows_it(monkeypatch):
  """Kernels are transposed for it; for a few tokens that would take longer than it saves."""
  seen, real = [], products.by_columns
  monkeypatch.setattr(products, 'by_columns', lambda *args: seen.append(args) or real(*args))
  monkeypatch.setattr(products, 'MIN_SIDE', 1)
  monkeypatch.setattr(products, 'SIDE_PER_ROW', 1)
  one = Subject(transformer.TransformerConfig(dim=24, num_layers=1, num_heads=2))  # of sizes that no other test has compiled
  short, long = (one.generate(['abc', 'k'], Settings(max_new_tokens=n, temperature=0.0)) for n in (knobs_lib.SHORT - 1, knobs_lib.SHORT))
  assert [made.tokens[: knobs_lib.SHORT - 1] for made in long] == [made.tokens for made in short]
  assert len(seen) == 7  # queries, keys, values, attention's output, up, down, logits: of the long texts alone


@pytest.mark.parametrize('error', [None, KeyboardInterrupt, errors.NoGoodCheckpoint])
def test_rows_in_threads_end_together(error, monkeypatch):
  """As many rows as fill several threads give what one thread gives; what ends one of them ends all."""
  one, settings = subject('rotary'), Settings(max_new_tokens=70, num_samples=2 * generate.ROWS_A_LANE, seed=2)
  monkeypatch.setattr(generate.os, 'cpu_count', lambda: 1)
  alone = one.generate(['abc'], settings)
  monkeypatch.setattr(generate.os, 'cpu_count', lambda: 2)
  draws, real = [], sampler.Sampler._draw

  def draw(self, limit):
    draws.append(self)
    if error and len(draws) == 2:
      raise error('here')
    return real(self, limit)

  monkeypatch.setattr(sampler.Sampler, '_draw', draw)
  if error is None:
    assert one.generate(['abc'], settings) == alone
    assert len(set(map(id, draws))) == 2
    monkeypatch.setattr(generate, 'MOST_BYTES_IN_LANES', 0)
    assert one.generate(['abc'], settings) == alone
    assert len(set(map(id, draws))) == 3  # a large model has one thread
    return
  with pytest.raises(error):
    one.generate(['abc'], settings)
  assert len(draws) < 2 * 3  # the other one didn't go on to its end


def test_settings_must_be_one_for_each_prompt():
  with pytest.raises(errors.UserError, match='settings: there are 1 for 2 prompts'):
    subject('lstm').generate(['a', 'b'], [Settings()])
  with pytest.raises(errors.UserError, match='settings: there are 2 for 1 prompts'):
    subject('lstm').generate(['a'], [Settings(), Settings()])


@pytest.mark.parametrize(
  ('prompts', 'told'),
  [('abc', "prompts='abc' is one text"), ([7], 'prompt 7 is not a text'), (['a', 'b\udc80'], 'offset 1 is not UTF-8 text')],
)
def test_prompts_are_texts(prompts, told):
  with pytest.raises(errors.UserError, match=told):
    subject('lstm').generate(prompts, Settings())


def test_an_unknown_character_is_an_error():
  with pytest.raises(errors.UserError, match="'Z' at offset 2"):
    subject('lstm').generate(['abc', 'abZ'], Settings())
  with pytest.raises(errors.UserError, match="'Z' at offset 0"):
    list(generate.stream(subject('lstm').model, None, TOKENIZER, 'Z', Settings()))


@pytest.mark.parametrize(
  ('name', 'settings', 'changes'),
  [
    ('rotary', DRAWN, [{'temperature': 0.1}, {'seed': 99}, {'max_new_tokens': 41}, {'stop': ('a',)}]),
    ('lstm', FILTERED, [{'temperature': 0.1}, {'top_k': 7}, {'top_p': 0.2}, {'min_p': 0.5}, {'max_new_tokens': knobs_lib.SHORT}]),
  ],
)
def test_turning_a_knob_compiles_nothing(name, settings, changes):
  one = subject(name)
  one.generate(PROMPTS, settings)
  before = decode.decode._cache_size(), decode.prefill._cache_size()
  for change in changes:
    one.generate(PROMPTS, dataclasses.replace(settings, **change))
  one.generate(PROMPTS, [settings, dataclasses.replace(settings, temperature=0), settings])
  assert (decode.decode._cache_size(), decode.prefill._cache_size()) == before


class Successor:
  """Certain that n is followed by n + 1."""

  vocab_size, context_length, window, slides, carries = 257, 8, None, False, False

  def init_cache(self, batch, length, rewinds=0):
    return jnp.zeros((batch, 1))

  def grow_cache(self, cache, length):
    return cache

  def apply(self, variables, x, cache=None, valid_BT=None, method=None):
    return jnp.log(jax.nn.one_hot((x + 1) % self.vocab_size, self.vocab_size)) if method == 'unembed' else (x, cache)


SUCCESSOR = Successor()
COUNT = ''.join(map(chr, range(32, 127)))  # what follows from ' '


def count(prompt, settings, tokenizer=None):
  return generate.generate(SUCCESSOR, {}, tokenizer or byte.ByteTokenizer(), [prompt], settings)[0]


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_any_object_with_the_contract_will_do(temperature):
  completion = count(' !"', Settings(temperature=temperature, max_new_tokens=80))
  assert completion.text == COUNT[3:83]
  assert completion.tokens == list(range(35, 115))


@pytest.mark.parametrize(
  ('stop', 'text', 'last'),
  [
    (('A',), COUNT[1:33], 'A'),  # the first token of the second segment
    (('@',), COUNT[1:32], '@'),  # the last one of the first
    (('?@A',), COUNT[1:31], 'A'),  # across the border
    (('9:;<=>?@AB',), COUNT[1:25], 'B'),
    (('!',), '', '!'),
    (('!"#',), '', '#'),
    (('b', '(', 'Z'), COUNT[1:8], '('),
    (('78', '6789', '8'), COUNT[1:23], '8'),  # '6789' begins first, but '78' is completed before it, and '8' ends with it
    (('8', '56789'), COUNT[1:24], '8'),
    (('~~', 'zz'), COUNT[1:61], None),
  ],
)
def test_stop_texts_are_trimmed(stop, text, last):
  settings = Settings(max_new_tokens=60, stop=stop)
  completion = count(' ', settings)
  assert completion.text == text
  assert completion.finish_reason == ('stop' if last else 'length')
  assert completion.tokens == list(range(33, ord(last) + 1 if last else 93))
  assert ''.join(generate.stream(SUCCESSOR, {}, byte.ByteTokenizer(), ' ', settings)) == text


def test_a_stop_text_counts_where_it_is_generated_not_in_the_prompt():
  assert count('AB', Settings(max_new_tokens=3, stop=('AB', 'BC'))).text == 'CDE'


class Echo(Successor):
  """Certain of the next one of some ids, by position alone."""

  def __init__(self, ids, vocab_size=257):
    self.ids, self.vocab_size = jnp.asarray(ids, jnp.int32), vocab_size

  def apply(self, variables, x, cache=None, valid_BT=None, method=None):
    if method == 'unembed':
      return jnp.log(jax.nn.one_hot(self.ids[x], self.vocab_size))
    steps_BT = jnp.ones_like(x) if valid_BT is None else valid_BT.astype(jnp.int32)
    return cache.astype(jnp.int32) + jnp.cumsum(steps_BT, axis=1) - 1, cache + steps_BT.sum(axis=1, keepdims=True)


VERSE = 'a\u00e9\u4e16\U0001f600' * 15  # 1 + 2 + 3 + 4 bytes: a segment ends inside a character


@pytest.mark.parametrize('stop', [(), (VERSE[1:3],), (VERSE[2:13],), ('\U0001f600b',)])
@pytest.mark.parametrize('length', [1, 2, 5, 31, SEGMENT, 33, 34, 35, 64, 101, 149])
def test_pieces_of_a_stream_are_whole_characters_and_join_to_the_text(stop, length):
  echo, settings = echo_of(VERSE), Settings(max_new_tokens=length, stop=stop)
  whole = generate.generate(echo, {}, byte.ByteTokenizer(), ['p'], settings)[0]
  pieces = list(generate.stream(echo, {}, byte.ByteTokenizer(), 'p', settings))
  assert ''.join(pieces) == whole.text
  expected = VERSE.encode()[:length].decode(errors='replace')
  at = expected.find(stop[0]) if stop else -1
  assert whole.text == (expected if at < 0 else expected[:at])
  assert (whole.finish_reason == 'stop') == (at >= 0)
  assert '\ufffd' not in ''.join(pieces[:-1])


@functools.cache
def echo_of(text):
  return Echo(list(text.encode()))


def test_a_stop_text_may_be_completed_by_the_end_itself():
  # The last character is cut in half and so becomes U+FFFD.
  settings = Settings(max_new_tokens=2, stop=('\ufffd',))
  whole = generate.generate(echo_of(VERSE), {}, byte.ByteTokenizer(), ['p'], settings)[0]
  assert (whole.text, whole.finish_reason, len(whole.tokens)) == ('a', 'stop', 2)
  assert ''.join(generate.stream(echo_of(VERSE), {}, byte.ByteTokenizer(), 'p', settings)) == 'a'


@families
def test_a_stream_is_the_text_of_generate(name):
  one = subject(name)
  for settings in (Settings(max_new_tokens=70, seed=2), Settings(max_new_tokens=70, seed=2, stop=('ab', 'k\n', 'jjj'))):
    for prompt in PROMPTS:
      pieces = list(generate.stream(one.model, one.params, TOKENIZER, prompt, settings))
      assert ''.join(pieces) == one.generate([prompt], settings)[0].text
      assert len(pieces) >= 3 or settings.stop


def test_a_stream_comes_in_pieces_while_it_is_made():
  pieces = generate.stream(SUCCESSOR, {}, byte.ByteTokenizer(), ' ', Settings(max_new_tokens=90, stop=('~~~',)))
  assert next(pieces) == COUNT[1 : SEGMENT - 1]  # two characters wait: a stop text may begin with them
  assert next(pieces) == COUNT[SEGMENT - 1 : 2 * SEGMENT - 1]
  assert ''.join(generate.stream(SUCCESSOR, {}, byte.ByteTokenizer(), ' ', Settings(max_new_tokens=0))) == ''


PRINTABLE = char.CharTokenizer(COUNT, '')
END = PRINTABLE.special_ids['end_of_text']  # 95, which follows '~'; ' ' follows it


class Counting(Successor):
  """Certain that n is followed by n + 1, and the last id by the first."""

  vocab_size = PRINTABLE.vocab_size


COUNTING = Counting()


def count_on(prompt, settings):
  return generate.generate(COUNTING, {}, PRINTABLE, [prompt], settings)[0]


@pytest.mark.parametrize('temperature', [0.0, 1.0])
@pytest.mark.parametrize('length', [0, 1, SEGMENT - 2, SEGMENT - 1, SEGMENT, 90])  # what is left of the text before its end
def test_the_end_of_a_text_ends_a_row(length, temperature):
  prompt, rest = COUNT[: 95 - length][-1], COUNT[95 - length :]
  ended = count_on(prompt, Ending(max_new_tokens=100, temperature=temperature))
  assert (ended.text, ended.finish_reason) == (rest, 'end')
  assert ended.tokens == [*range(95 - length, 95), END]
  assert ended.text == PRINTABLE.decode(ended.tokens)
  # Else the next text follows, and the end has no characters.
  on = count_on(prompt, Settings(max_new_tokens=100, temperature=temperature))
  assert on.tokens == [(95 - length + n) % 96 for n in range(100)]
  assert (on.text, on.finish_reason) == (''.join(COUNT[i] for i in on.tokens if i != END), 'length')
  for settings, whole in ((Ending(max_new_tokens=100), ended), (Settings(max_new_tokens=100), on)):
    assert ''.join(generate.stream(COUNTING, {}, PRINTABLE, prompt, settings)) == whole.text


@pytest.mark.parametrize(('length', 'reason'), [(3, 'length'), (4, 'end'), (5, 'end')])
def test_a_text_may_end_with_the_last_token_asked_for(length, reason):
  completion = count_on('{', Ending(max_new_tokens=length))
  assert (completion.text, completion.finish_reason, len(completion.tokens)) == ('|}~', reason, min(length, 4))


@pytest.mark.parametrize(
  ('stop', 'ended', 'gone_on'),
  [
    (('}',), ('|', 'stop'), ('|', 'stop')),
    (('~ ',), ('|}~', 'end'), ('|}', 'stop')),  # across the end
    (('~',), ('|}', 'stop'), ('|}', 'stop')),
    (('!',), ('|}~', 'end'), ('|}~ ', 'stop')),
  ],
)
def test_stop_texts_and_the_end(stop, ended, gone_on):
  for make, expected in ((Ending, ended), (Settings, gone_on)):
    settings = make(max_new_tokens=50, stop=stop)
    completion = count_on('{', settings)
    assert (completion.text, completion.finish_reason) == expected
    assert ''.join(generate.stream(COUNTING, {}, PRINTABLE, '{', settings)) == expected[0]


def test_an_ended_row_disturbs_no_other():
  prompts = ['{', 'A', '{', ' ', 'z']
  rows = [Ending(), Ending(), Settings(), Settings(), Ending(max_new_tokens=2)]
  together = generate.generate(COUNTING, {}, PRINTABLE, prompts, rows)
  assert together == [count_on(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
  assert [completion.finish_reason for completion in together] == ['end', 'length', 'length', 'length', 'length']


@families
def test_an_ended_text_is_the_beginning_of_one_that_goes_on(name):
  one, end = subject(name), TOKENIZER.special_ids['end_of_text']
  settings = {'num_samples': 8, 'max_new_tokens': 12, 'seed': 1}
  ended, on = (one.generate(['abc', ''], make(**settings)) for make in (Ending, Settings))
  for short, long in zip(ended, on, strict=True):
    size = long.tokens.index(end) + 1 if end in long.tokens else len(long.tokens)
    assert short.tokens == long.tokens[:size]
    assert (short.finish_reason == 'end') == (end in long.tokens)
    assert short.text == TOKENIZER.decode(short.tokens)
  assert {completion.finish_reason for completion in ended} == {'end', 'length'}
  stream = generate.stream(one.model, one.params, TOKENIZER, 'abc', Ending(max_new_tokens=12, seed=1))
  assert ''.join(stream) == ended[0].text


MARKED = char.CharTokenizer('abcdef', '?')
UNKNOWN = MARKED.special_ids['unknown']


class Unsure(Successor):
  """Finds the unknown symbol e**3 times likelier than anything else."""

  vocab_size = MARKED.vocab_size

  def apply(self, variables, x, cache=None, valid_BT=None, method=None):
    if method == 'unembed':
      return jnp.broadcast_to(3.0 * jax.nn.one_hot(UNKNOWN, self.vocab_size), (*x.shape, self.vocab_size))
    return x, cache


UNSURE = Unsure()
WAYS = [{'temperature': 0.0}, {'temperature': 1e-9}, {}, {'temperature': 100.0}, {'top_k': 1}, {'top_p': 0.5}, {'min_p': 1.0}]


@pytest.mark.parametrize('way', WAYS, ids=str)
def test_unknown_is_drawn_only_where_it_may_be(way):
  rows = [Settings(allow_unknown=allowed, seed=seed, **way) for seed, allowed in enumerate([False, True, False])]
  together = generate.generate(UNSURE, {}, MARKED, ['a', 'b?', 'c'], rows)
  assert [UNKNOWN in completion.tokens for completion in together] == [False, True, False]
  assert ['?' in completion.text for completion in together] == [False, True, False]
  alone = [generate.generate(UNSURE, {}, MARKED, [c.prompt], row)[0] for c, row in zip(together, rows, strict=True)]
  assert alone == together
  assert ''.join(generate.stream(UNSURE, {}, MARKED, 'a', rows[0])) == together[0].text
  if not way:  # the others are as likely among themselves as they were
    drawn = generate.generate(UNSURE, {}, MARKED, ['a'], Settings(num_samples=9))
    counts = np.bincount([i for completion in drawn for i in completion.tokens], minlength=MARKED.vocab_size)
    assert counts[UNKNOWN] == 0
    assert (np.delete(counts, UNKNOWN) > 25).all()  # of 360 draws among 7


def test_a_tokenizer_without_unknown_draws_from_all():
  assert 'unknown' not in TOKENIZER.special_ids
  one = subject('lstm')
  assert one.generate(['abc'], Settings()) == one.generate(['abc'], Settings(allow_unknown=True))


SPOKEN = 'The king, who went (with "his" fool) over hill-field; and home.\n\nSaid he: go, fool!\n'


@pytest.mark.parametrize('standardize', [False, True])
def test_words_are_spaced_right_where_generation_starts(standardize):
  tokenizer = word.WordTokenizer.train(base.TokenizerConfig(kind='word', coverage=1.0, standardize=standardize), [SPOKEN])
  whole = tokenizer.encode(SPOKEN).tolist()
  text, checked = tokenizer.decode(whole), 0
  for size in range(1, len(whole)):
    prompt = tokenizer.decode(whole[:size])
    if tokenizer.encode(prompt).tolist() != whole[:size]:  # such as before a sign whose neighbour decides what it is
      continue
    echo, settings = Echo(whole[1:] + [0], tokenizer.vocab_size), Settings(max_new_tokens=len(whole) - size, temperature=0)
    completion = generate.generate(echo, {}, tokenizer, [prompt], settings)[0]
    assert completion.tokens == whole[size:]
    assert prompt + completion.text == text
    assert prompt + ''.join(generate.stream(echo, {}, tokenizer, prompt, settings)) == text
    if size < len(whole) - 3:  # a row that a stop text ends is decoded anew, the prompt too
      cut = generate.generate(echo, {}, tokenizer, [prompt], dataclasses.replace(settings, stop=('fool!',)))[0]
      assert prompt + cut.text == text.removesuffix('\n').removesuffix('fool!')
    checked += 1
  assert checked > len(whole) // 2


def test_a_prompt_that_ends_with_a_space_gets_no_second_one():
  tokenizer = word.WordTokenizer.train(base.TokenizerConfig(kind='word', coverage=1.0), [SPOKEN])
  for prompt, space in (('The king ', ''), ('The king', ' '), ('The king, ', ''), ('The king,', ' '), ('The king\n', ''), ('', '')):
    ids, then = batch.prompt_ids(tokenizer, prompt), tokenizer.encode('went home.').tolist()
    echo = Echo([*ids, *then][1:] + [0], tokenizer.vocab_size)
    completion = generate.generate(echo, {}, tokenizer, [prompt], Settings(max_new_tokens=len(then), temperature=0))[0]
    assert (completion.tokens, completion.text) == (then, space + 'went home.')
