import random

import numpy as np
import pytest

from textgen_jax import errors
from textgen_jax.text import build, byte

TEXTS = ['', 'plain', 'na\u00efve \u4e16\u754c \U0001f600\n', 'tab\t\x00\x7f']


@pytest.mark.parametrize('text', TEXTS)
def test_decode_inverts_encode(text):
  tokenizer = byte.ByteTokenizer()
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert bytes(ids.tolist()) == text.encode()
  assert tokenizer.special_ids['end_of_text'] not in ids
  assert tokenizer.decode(ids) == text


def test_decode_inverts_encode_on_random_strings():
  tokenizer = byte.ByteTokenizer()
  generator = np.random.default_rng(0)
  for size in generator.integers(0, 30, 10_000):
    points = np.where(generator.random(size) < 0.5, generator.integers(0x3000, size=size), generator.integers(0x110000, size=size))
    text = ''.join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_that_are_no_utf8_come_back_from_an_argument():
  argument = b'a\xff\xc3'.decode('utf-8', 'surrogateescape')
  assert byte.ByteTokenizer().encode(argument).tolist() == [0x61, 0xFF, 0xC3]


def test_half_a_surrogate_pair_is_an_error():
  with pytest.raises(errors.UserError, match=r"'\\ud800' at offset 2"):
    byte.ByteTokenizer().encode('ab\ud800')


def test_stream_equals_whole_for_any_bytes_and_any_cuts():
  tokenizer = byte.ByteTokenizer()
  generator = random.Random(0)
  alphabet = ['a', '\u00e9', '\u4e16', '\U0001f600']
  for _ in range(300):
    data = bytearray(''.join(generator.choices(alphabet, k=8)).encode())
    for _ in range(generator.randrange(3)):
      data[generator.randrange(len(data))] = generator.randrange(256)
    decoder, parts, place = tokenizer.incremental_decoder(), [], 0
    while place < len(data):
      size = generator.randrange(4)
      parts.append(decoder.feed(list(data[place : place + size])))
      place += size
    assert ''.join([*parts, decoder.flush()]) == tokenizer.decode(list(data)) == bytes(data).decode('utf-8', 'replace')


def test_stream_holds_back_half_a_character():
  decoder = byte.ByteTokenizer().incremental_decoder()
  assert [decoder.feed([b]) for b in '\u4e16'.encode()] == ['', '', '\u4e16']
  assert decoder.feed([0xE4]) == ''
  assert decoder.flush() == '\ufffd'


@pytest.mark.parametrize('ids', [[-1], [257], [3, 300]])
def test_ids_outside_the_vocabulary_are_refused(ids):
  tokenizer = byte.ByteTokenizer()
  for decode in (tokenizer.decode, tokenizer.incremental_decoder().feed):
    with pytest.raises(errors.UserError, match=r'outside the vocabulary \[0, 257\)'):
      decode(ids)


def test_the_end_of_a_text_is_nothing_to_read():
  tokenizer = byte.ByteTokenizer()
  end = tokenizer.special_ids['end_of_text']
  assert end == 256 == tokenizer.vocab_size - 1
  assert tokenizer.decode([97, end, 98]) == 'ab'
  assert tokenizer.decode([end]) == ''
  decoder = tokenizer.incremental_decoder()
  assert [decoder.feed([i]) for i in (0xC3, end, 0xA9)] == ['', '', '\u00e9']  # no byte of a character


def test_nothing_is_unknown_and_any_place_will_do_to_cut():
  tokenizer, text = byte.ByteTokenizer(), 'na\u00efve \u4e16\udcff'
  assert tokenizer.unknowns(text) == []
  assert tokenizer.cut(text) == len(text)
  assert tokenizer.cut('') == 0
  for place in range(len(text)):
    parts = [tokenizer.encode(text[:place]), tokenizer.encode(text[place:])]
    assert np.concatenate(parts).tolist() == tokenizer.encode(text).tolist()
  assert not tokenizer.standardizes


def test_saves_and_loads(tmp_path):
  tokenizer = byte.ByteTokenizer()
  tokenizer.save(tmp_path)
  loaded = build.load(tmp_path)
  assert loaded.kind == 'byte'
  assert loaded.fingerprint() == tokenizer.fingerprint()
  assert loaded.special_ids == {'end_of_text': 256}


def test_spelling_is_the_bytes():
  texts = byte.ByteTokenizer().spelling().texts
  assert texts == ((*(bytes([i]) for i in range(256)), b''),)
