import numpy as np
import pytest

from textgen_jax import errors
from textgen_jax.text import base, build, char


def train(*texts, unknown_symbol=''):
  return char.CharTokenizer.train(base.TokenizerConfig(unknown_symbol=unknown_symbol), texts)


def test_ids_follow_code_points():
  tokenizer = train('ba\n', '\u4e16a\U0001f600')
  assert tokenizer.vocab_size == 6
  ids = tokenizer.encode('\nab\u4e16\U0001f600b')
  assert ids.dtype == np.int32
  assert ids.tolist() == [0, 1, 2, 3, 4, 2]
  assert tokenizer.decode(ids) == '\nab\u4e16\U0001f600b'
  assert tokenizer.encode('').shape == (0,)
  assert tokenizer.decode([]) == ''


@pytest.mark.parametrize('symbol', ['', '?'])
def test_the_end_of_a_text_has_an_id_of_its_own_and_is_nothing_to_read(symbol):
  tokenizer = train('a\nb', unknown_symbol=symbol)
  end = tokenizer.special_ids['end_of_text']
  assert end == tokenizer.vocab_size - 1 == 3 + len(symbol)
  assert tokenizer.decode([1, end, end, 2]) == 'ab'
  assert tokenizer.decode([end]) == ''
  assert tokenizer.incremental_decoder().feed([end, 1]) == 'a'
  assert end not in tokenizer.encode('a\nb')


def test_decode_inverts_encode_on_random_strings_of_its_alphabet():
  generator = np.random.default_rng(0)
  alphabet = np.array(list('aé€😀\n\t\u2581\ufeff \0xyz'))
  tokenizer = build.train(base.TokenizerConfig(kind='char'), [''.join(alphabet)])
  for size in generator.integers(0, 30, 10_000):
    text = ''.join(generator.choice(alphabet, size))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_unknowns_are_the_characters_that_become_the_symbol():
  tokenizer = train('abc?', unknown_symbol='?')
  assert tokenizer.unknowns('a?z\u00e9zb') == ['z', '\u00e9', 'z']  # the symbol that the text holds is known
  assert train('abc').unknowns('abc') == []
  assert not tokenizer.standardizes


def test_any_place_will_do_to_cut():
  tokenizer = train('abc')
  assert [tokenizer.cut(text) for text in ('', 'a', 'abca')] == [0, 1, 4]


@pytest.mark.parametrize('ids', [[-1], [4], [0, 2**31]])
def test_ids_outside_the_vocabulary_are_refused(ids):
  tokenizer = train('abc')
  for decode in (tokenizer.decode, tokenizer.incremental_decoder().feed):
    with pytest.raises(errors.UserError, match=r'outside the vocabulary \[0, 4\)'):
      decode(ids)


@pytest.mark.parametrize(('text', 'offset'), [('abcz', 3), ('\u00e9', 0), ('a\U0010ffff', 1), ('a\udc80', 1), ('\x00', 0)])
def test_unknown_character_is_named(text, offset):
  with pytest.raises(errors.UserError, match='unknown_symbol') as caught:
    train('abc').encode(text)
  assert f'{text[offset]!r} at offset {offset}' in str(caught.value)


def test_unknown_symbol_has_an_id_of_its_own():
  tokenizer = train('abc?\n', unknown_symbol='?')
  assert tokenizer.vocab_size == 7
  assert tokenizer.special_ids == {'unknown': 5, 'end_of_text': 6}
  assert tokenizer.encode('az\udc80\U0010ffff?').tolist() == [2, 5, 5, 5, 1]
  assert tokenizer.decode([2, 5, 1]) == 'a??'


def test_stream_equals_whole():
  tokenizer = train('a\u4e16\U0001f600')
  decoder = tokenizer.incremental_decoder()
  assert decoder.feed([2]) + decoder.feed([]) + decoder.feed([0, 1]) + decoder.flush() == tokenizer.decode([2, 0, 1])


@pytest.mark.parametrize('symbol', ['', '\ufffd'])
def test_saves_and_loads(tmp_path, symbol):
  tokenizer = train('q\u00e9\U0001f600x', unknown_symbol=symbol)
  tokenizer.save(tmp_path / 'new')
  loaded = build.load(tmp_path / 'new')
  assert loaded.fingerprint() == tokenizer.fingerprint()
  assert loaded.special_ids == tokenizer.special_ids
  assert loaded.decode(range(loaded.vocab_size)) == 'qx\u00e9\U0001f600' + symbol
  assert [path.name for path in (tmp_path / 'new').iterdir()] == ['tokenizer.json']


def test_fingerprint_tells_vocabularies_apart():
  cases = [('ab', ''), ('abc', ''), ('ab', '?'), ('ab?', '')]
  prints = {train(text, unknown_symbol=symbol).fingerprint() for text, symbol in cases}
  assert len(prints) == 4
  assert train('ba').fingerprint() == train('ab').fingerprint()  # ids and texts are the same


def test_empty_and_broken_training_text_is_refused():
  with pytest.raises(errors.UserError, match='at least 1 character'):
    train('', '')
  with pytest.raises(errors.UserError, match='surrogate'):
    train('a\ud800')


def test_spelling_is_utf8():
  assert train('a\u4e16', unknown_symbol='\u00e9').spelling().texts == ((b'a', b'\xe4\xb8\x96', b'\xc3\xa9', b''),)
