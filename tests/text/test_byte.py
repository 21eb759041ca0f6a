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
  assert tokenizer.decode(ids) == text


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


@pytest.mark.parametrize('ids', [[-1], [256], [3, 300]])
def test_ids_outside_the_vocabulary_are_refused(ids):
  with pytest.raises(ValueError, match='outside'):
    byte.ByteTokenizer().decode(ids)


def test_saves_and_loads(tmp_path):
  tokenizer = byte.ByteTokenizer()
  tokenizer.save(tmp_path)
  loaded = build.load(tmp_path)
  assert loaded.kind == 'byte'
  assert loaded.fingerprint() == tokenizer.fingerprint()
  assert loaded.special_ids == {'document_start': 10}
  assert loaded.byte_lengths().tolist() == [1] * 256
