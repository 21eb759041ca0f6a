import dataclasses
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from textgen_jax import errors
from textgen_jax.data import corpora, files, prepare, tokens, windows
from textgen_jax.text import base
from textgen_jax.training import evaluate

END = 10  # the last of 11 ids
Reading = evaluate.Reading


def make_split(*documents, is_reply=None):
  """Documents of ids, each after END, with one more at the end; an id stands for a byte."""
  ids = np.array([END, *(i for one in documents for i in (*one, END))], np.uint8)
  is_reply = None if is_reply is None else np.array(is_reply)
  records, start = np.zeros(len(documents), tokens.DOCUMENT), 0
  for record, one in zip(records, documents, strict=True):
    stop = start + 1 + len(one)
    counts = np.ones(stop - start, bool) if is_reply is None else is_reply[start + 1 : stop + 1]
    record['start'], record['tokens'] = start, counts.sum()
    record['bytes'] = record['characters'] = counts[:-1].sum()
    record['words'] = 1
    start = stop
  return tokens.Split(ids, records, (tokens.Range(0, len(ids), 1.0),), is_reply)


def draw(*lengths, seed=1):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, END, length).tolist() for length in lengths]


DOCUMENTS = draw(7, 1, 12, 3, 9)
SPLIT = make_split(*DOCUMENTS)  # 38 tokens


def score(model, params, split=SPLIT, length=5, batch_size=3, **options):
  how = {name: options.pop(name) for name in ('stride', 'carried', 'end_of_text') if name in options}
  return evaluate.evaluate(model, params, split, Reading(length=length, **how), batch_size=batch_size, **options)


def brute_force(model, params, split, row_length, stride=0, end_of_text=None):
  """Each token but the first, from those of its row alone (or of its document within the row), one at a time."""

  @jax.jit
  def log_p_V(prefix_T, last):
    hidden_BTD, _ = model.apply({'params': params}, prefix_T[None])
    return jax.nn.log_softmax(model.apply({'params': params}, hidden_BTD, method='unembed')[0, last])

  nll, stride = [], stride or row_length
  for target in range(1, len(split.tokens)):
    row = max(0, -(-(target - row_length) // stride))  # the first one that reaches it
    prefix = split.tokens[row * stride : target].tolist()
    if end_of_text in prefix:
      prefix = prefix[len(prefix) - 1 - prefix[::-1].index(end_of_text) :]
    padded_T = np.pad(prefix, (0, row_length - len(prefix))).astype(np.int32)  # zeros for all that a causal model mustn't see
    nll.append(-float(log_p_V(padded_T, len(prefix) - 1)[int(split.tokens[target])]))
  return nll


def by_document(nll, split):
  """Losses of all tokens but the first, summed over each document."""
  stops = [*split.documents['start'][1:], len(split.tokens) - 1]
  return [sum(nll[start:stop]) for start, stop in zip(split.documents['start'], stops, strict=True)]


@pytest.mark.parametrize('end_of_text', [None, END])
@pytest.mark.parametrize('stride', [0, 1, 2, 3, 5])
def test_equals_brute_force(stride, end_of_text, model, make_params):
  params = make_params(model)
  found = score(model, params, stride=stride, end_of_text=end_of_text)
  expected = brute_force(model, params, SPLIT, 5, stride, end_of_text)
  assert found.tokens == len(expected) == 37
  np.testing.assert_allclose(found.nll_sums, by_document(expected, SPLIT), rtol=1e-6)
  np.testing.assert_allclose(found.loss_nats, np.mean(expected), rtol=1e-6)


def test_stride_decides_the_context(model, make_params):
  losses = [score(model, make_params(model), stride=stride).loss_nats for stride in (1, 3, 5)]
  assert all(abs(a - b) > 1e-4 for a, b in [losses[:2], losses[1:], losses[::2]])


def test_every_tokens_own_loss(model, make_params):
  params = make_params(model)
  found = dict.fromkeys(range(1, 38))
  for places, nll in evaluate.token_losses(model, params, SPLIT, Reading(length=5, stride=2), batch_size=3):
    for place, value in zip(places, nll, strict=True):
      assert found[place] is None  # once
      found[place] = value
  np.testing.assert_allclose(list(found.values()), brute_force(model, params, SPLIT, 5, 2), rtol=2e-6)


@pytest.mark.parametrize('end_of_text', [None, END])
@pytest.mark.parametrize('num_tokens', [38, 37, 13, 12, 3, 2])
def test_carried_rows_equal_brute_force(num_tokens, end_of_text, make_model, make_params, monkeypatch):
  monkeypatch.setattr(evaluate, 'CARRIED_ROW_TOKENS', 8)  # two calls of 4 that count, after one that warms up
  model = make_model('lstm')
  params, split = make_params(model), tokens.prefix(SPLIT, num_tokens)
  found = score(model, params, split, length=4, batch_size=2, carried=True, end_of_text=end_of_text)
  expected = brute_force(model, params, split, 12, 8, end_of_text)
  np.testing.assert_allclose(found.nll_sums, by_document(expected, split), rtol=1e-6)
  assert found.tokens == num_tokens - 1
  if num_tokens > 5:  # the carry matters
    uncarried = score(model, params, split, length=4, batch_size=2, end_of_text=end_of_text)
    assert found.loss_nats != pytest.approx(uncarried.loss_nats, rel=1e-3)


class ReversedRows(windows.EvaluationRows):
  """The last row first."""

  def batch(self, first, stop):
    batch, places_BT = super().batch(0, max(self.num_rows, stop))
    order = [self.num_rows - 1 - row if row < self.num_rows else row for row in range(first, stop)]
    return jax.tree.map(lambda x: x[order], batch), places_BT[order]


@pytest.mark.parametrize('reading', [Reading(length=5), Reading(length=5, stride=2, end_of_text=END), Reading(length=4, carried=True)])
def test_depends_on_neither_batch_size_nor_order(reading, model, make_params, monkeypatch):
  if reading.carried and model.window is not None:
    pytest.skip('carries nothing')
  monkeypatch.setattr(evaluate, 'CARRIED_ROW_TOKENS', 8)
  params = make_params(model)
  scores = [evaluate.evaluate(model, params, SPLIT, reading, batch_size=size) for size in (1, 3, 8, 20)]
  scores += [evaluate.evaluate(model, params, SPLIT, reading, batch_size=8, divisor=4)]
  monkeypatch.setattr(windows, 'EvaluationRows', ReversedRows)
  scores += [evaluate.evaluate(model, params, SPLIT, reading, batch_size=size) for size in (1, 3)]
  assert {one.tokens for one in scores} == {37}
  for one in scores:
    np.testing.assert_allclose(one.nll_sums, scores[0].nll_sums, rtol=1e-6)
    np.testing.assert_allclose(one.bits_per_byte, scores[0].bits_per_byte, rtol=1e-6)


@pytest.mark.parametrize('num_tokens', range(2, 18))
@pytest.mark.parametrize('stride', [1, 3, 5])
def test_every_token_but_the_first_counts_once(num_tokens, stride, make_model):
  split = tokens.prefix(SPLIT, num_tokens)
  # No losses are needed to see which of them count.
  model = make_model('transformer')
  counted = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(evaluate, 'nll', lambda model, params, cache, batch: (np.zeros(batch.tokens_BT.shape), cache))
    for places, _ in evaluate.token_losses(model, {}, split, Reading(length=5, stride=stride), batch_size=2, put=lambda x: x):
      counted += places.tolist()
  assert sorted(counted) == list(range(1, num_tokens))


# Rows that hold every document whole, wherever it stands: of the whole text; one for each token; with a warm-up as long.
WHOLE = {
  'one row': Reading(length=60, end_of_text=END),
  'overlapping': Reading(length=14, stride=1, end_of_text=END),
  'carried': Reading(length=14, carried=True, end_of_text=END),
}


@pytest.mark.parametrize('how', WHOLE)
def test_a_document_is_scored_alike_whatever_stands_before_it(how, model, make_params, monkeypatch):
  if how == 'carried' and model.window is not None:
    pytest.skip('carries nothing')
  monkeypatch.setattr(evaluate, 'CARRIED_ROW_TOKENS', 14)
  params, reading = make_params(model), WHOLE[how]

  def losses(documents, reading=reading):
    return evaluate.evaluate(model, params, make_split(*documents), reading, batch_size=3).nll_sums

  alone = [losses([one])[0] for one in DOCUMENTS]
  np.testing.assert_allclose(losses(DOCUMENTS), alone, rtol=1e-5)
  np.testing.assert_allclose(losses(DOCUMENTS[::-1]), alone[::-1], rtol=1e-5)
  other = draw(4, 11, 2, seed=2)
  np.testing.assert_allclose(losses([*other, *DOCUMENTS])[3:], alone, rtol=1e-5)
  # Where documents see each other, what stands before them is in their losses, all but the first one's.
  open_reading = dataclasses.replace(reading, end_of_text=None)
  together, after = losses(DOCUMENTS, open_reading), losses([*other, *DOCUMENTS], open_reading)[3:]
  assert together[0] == pytest.approx(alone[0], rel=1e-5)
  assert min(abs(together[1:] / alone[1:] - 1)) > 1e-4
  assert abs(after[0] / alone[0] - 1) > 1e-4


def test_replies_alone_are_scored(model, make_params):
  # Two documents: asked 3 tokens, answered 4 (the end of the text is the answer's last); asked 2, answered 2.
  is_reply = [False, *[False] * 3, *[True] * 4, *[False] * 2, *[True] * 2]
  split = make_split(*draw(6, 3), is_reply=is_reply)
  params = make_params(model)
  for stride in (0, 2):
    found = score(model, params, split, stride=stride, end_of_text=END)
    expected = np.array(brute_force(model, params, split, 5, stride, END))
    np.testing.assert_allclose(found.nll_sums, [expected[3:7].sum(), expected[9:11].sum()], rtol=1e-6)
    assert (found.tokens, found.summary()['bytes']) == (6, 4)
    np.testing.assert_allclose(found.loss_nats, (expected[3:7].sum() + expected[9:11].sum()) / 6, rtol=1e-6)


@pytest.mark.parametrize('place', [3, 37])
def test_a_token_outside_the_vocabulary_is_refused(place, model, make_params):
  split = SPLIT._replace(tokens=SPLIT.tokens.copy())
  split.tokens[place] = 11  # the embedding has a 12th row, which only pads it
  with pytest.raises(errors.UserError, match=r'token id 11 is not in the vocabulary \[0, 11\)'):
    score(model, make_params(model), split)


def test_a_stride_that_leaves_tokens_out_is_refused(make_model):
  for stride in (-1, 6):
    with pytest.raises(errors.UserError, match=rf'stride={stride} is not in \[1, 5\]'):
      score(make_model('lstm'), {}, stride=stride)


def test_a_uniform_model_scores_the_logarithm_of_its_vocabulary(model, make_params):
  zeros = jax.tree.map(jnp.zeros_like, make_params(model))  # 12 logits of 0, of which one only pads
  found = score(model, zeros)
  np.testing.assert_allclose(found.loss_nats, math.log(11), rtol=1e-6)
  np.testing.assert_allclose(found.perplexity, 11, rtol=1e-5)


def make_text():
  """20,000 characters of made-up words, the frequent ones short; some of two and three bytes a character."""
  rng = random.Random(0)
  words = [''.join(rng.choices('abdeghiklmnoprstuvéß世', k=2 + n // 60)) for n in range(400)]
  weights = [1 / (n + 1) for n in range(400)]
  return ''.join(' '.join(rng.choices(words, weights, k=8)) + '\n' for _ in range(600))


TOKENIZERS = {
  'char': base.TokenizerConfig(kind='char'),
  'byte': base.TokenizerConfig(kind='byte'),
  'word': base.TokenizerConfig(kind='word', coverage=0.9),
  'word, standardized': base.TokenizerConfig(kind='word', coverage=0.9, standardize=True),
  'bpe': base.TokenizerConfig(kind='sentencepiece', vocab_size=400),
  'unigram': base.TokenizerConfig(kind='sentencepiece', vocab_size=400, model_type='unigram'),
}


@pytest.mark.parametrize('name', TOKENIZERS)
def test_bits_per_byte_of_a_uniform_model(name, tmp_path, make_model, make_params):
  text = make_text()
  (tmp_path / 'text.txt').write_text(text, encoding='utf-8')
  prepared = prepare.prepare(corpora.DataConfig(path=str(tmp_path / 'text.txt')), TOKENIZERS[name])
  tokenizer, val = prepared.tokenizer, text[files.cut_place(len(text), 0.1) :]
  model = make_model('lstm', tokenizer.vocab_size)
  zeros = jax.tree.map(jnp.zeros_like, make_params(model))
  found = score(model, zeros, prepared.splits['val'], length=16, batch_size=8, standardizes=tokenizer.standardizes)
  # Every token of the text and the one that ends it, at log2(V) bits each.
  num_tokens = len(tokenizer.encode(val)) + 1
  bits = num_tokens * math.log2(tokenizer.vocab_size)
  np.testing.assert_allclose(found.loss_nats, math.log(tokenizer.vocab_size), rtol=1e-6)
  unknown = []
  if TOKENIZERS[name].kind == 'word':
    unknown = [word for word in val.split() if word not in tokenizer.pieces()]
    assert 50 < len(unknown) < len(val.split()) / 5
  bits += sum(8 * (len(word.encode()) + 1) for word in unknown)
  summary = found.summary()
  counts = {'tokens': num_tokens, 'bytes': len(val.encode()), 'characters': len(val), 'words': len(val.split()), 'unknowns': len(unknown)}
  assert {count: summary[count] for count in counts} == counts
  if tokenizer.standardizes:
    told = [summary[measure] for measure in ('bits_per_byte', 'bits_per_byte_stderr', 'bits_per_character', 'word_perplexity')]
    assert (found.bits_per_byte, *told) == (None,) * 5
  else:
    np.testing.assert_allclose(found.bits_per_byte, bits / len(val.encode()), rtol=1e-6)
    np.testing.assert_allclose(summary['bits_per_character'], bits / len(val), rtol=1e-6)
    np.testing.assert_allclose(math.log2(summary['word_perplexity']), bits / len(val.split()), rtol=1e-6)


def make_score(nll, num_tokens, num_bytes=None, standardizes=False, **measures):
  documents = np.zeros(len(nll), tokens.DOCUMENT)
  documents['tokens'], documents['bytes'] = num_tokens, num_tokens if num_bytes is None else num_bytes
  for name, values in measures.items():
    documents[name] = values
  return evaluate.Score(np.array(nll, np.float64), documents, standardizes)


def test_standard_error_by_hand():
  # 18 nats over 10 tokens are 1.8; what that leaves of each document is -0.6, 1.4 and -0.8.
  summary = make_score([3.0, 5.0, 10.0], [2, 2, 6], [4, 4, 12]).summary()
  expected = math.sqrt(3 / 2 * (0.36 + 1.96 + 0.64)) / 10
  np.testing.assert_allclose((summary['loss_nats'], summary['loss_nats_stderr']), (1.8, expected), rtol=1e-12)
  # Twice as many bytes halve both.
  np.testing.assert_allclose(summary['bits_per_byte'], 0.9 / math.log(2), rtol=1e-12)
  np.testing.assert_allclose(summary['bits_per_byte_stderr'], expected / 2 / math.log(2), rtol=1e-12)


def test_standard_error_is_close_to_the_jackknifes():
  rng = np.random.default_rng(0)
  sizes = rng.integers(5, 60, 300)
  nll_D = sizes * rng.normal(2.0, 0.5, 300)
  without_D = (nll_D.sum() - nll_D) / (sizes.sum() - sizes)
  jackknife = math.sqrt(299 / 300 * ((without_D - without_D.mean()) ** 2).sum())
  np.testing.assert_allclose(make_score(nll_D, sizes).summary()['loss_nats_stderr'], jackknife, rtol=0.02)


def test_standard_error_charges_spelling_too():
  # 1 unknown piece of 3 bytes in the first document: 4 * 8 bits more, for its text but not for its tokens.
  charged = make_score([3.0, 5.0], [2, 3], unknowns=[1, 0], unknown_bytes=[3, 0])
  plain = make_score([3.0 + 4 * math.log(256), 5.0], [2, 3])
  assert charged.bits_per_byte == plain.bits_per_byte
  assert charged.summary()['bits_per_byte_stderr'] == plain.summary()['bits_per_byte_stderr']
  assert charged.loss_nats == 8 / 5


def test_one_document_has_no_standard_error():
  summary = make_score([3.0], [2]).summary()
  assert (summary['loss_nats_stderr'], summary['bits_per_byte_stderr']) == (None, None)


def test_scores_of_documents_add_up(model, make_params):
  whole = score(model, make_params(model), end_of_text=END)
  each = [whole.of(n) for n in range(len(DOCUMENTS))]
  assert [one.tokens for one in each] == [len(one) + 1 for one in DOCUMENTS]
  assert sum(one.tokens for one in each) == whole.tokens
  np.testing.assert_allclose(sum(one.loss_nats * one.tokens for one in each), whole.loss_nats * whole.tokens, rtol=1e-12)
  bits = [one.bits_per_byte * one.summary()['bytes'] for one in each]
  np.testing.assert_allclose(sum(bits), whole.bits_per_byte * whole.summary()['bytes'], rtol=1e-12)
  assert {one.standardizes for one in each} == {False}
  assert make_score([1.0, 2.0], 1, standardizes=True).of(1).bits_per_byte is None


def test_a_text_without_bytes_has_no_bits_per_byte():
  summary = make_score([2.0, 1.0], [1, 1], [0, 0]).summary()
  assert (summary['bits_per_byte'], summary['bits_per_byte_stderr'], summary['loss_nats']) == (None, None, 1.5)


def test_perplexity_does_not_overflow():
  assert make_score([1e6], 10).perplexity == math.exp(700)
  assert make_score([1e6], 10, words=10).summary()['word_perplexity'] == math.exp(700)
  assert math.isnan(make_score([math.nan], 10).perplexity)
