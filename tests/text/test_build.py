import dataclasses
import json
import math

import numpy as np
import pytest

from textgen_jax import errors
from textgen_jax.text import base, build

GOOD = {'format': base.FORMAT, 'kind': 'char', 'characters': 'abc', 'unknown_symbol': ''}
# Each kind's id for every piece of the text is learned from it; sentencepiece needs as many ids as there are bytes, and more.
TEXT = 'some text, and some more text: the text of some\n' * 20
CONFIGS = {kind: base.TokenizerConfig(kind=kind) for kind in build.KINDS}
CONFIGS['word'] = base.TokenizerConfig(kind='word', coverage=1.0)
CONFIGS['sentencepiece'] = base.TokenizerConfig(kind='sentencepiece', vocab_size=280)


@pytest.mark.parametrize('kind', build.KINDS)
def test_trains_the_kind_that_is_asked_for(kind):
  tokenizer = build.train(CONFIGS[kind], [TEXT])
  assert tokenizer.kind == kind
  assert tokenizer.decode(tokenizer.encode('more text\n')) == 'more text\n'


@pytest.mark.parametrize('kind', build.KINDS)
def test_what_every_kind_promises(kind, tmp_path):
  tokenizer = build.train(CONFIGS[kind], [TEXT])
  ids, end = tokenizer.encode(TEXT), tokenizer.special_ids['end_of_text']
  assert ids.dtype == np.int32
  assert 0 <= end < tokenizer.vocab_size
  assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
  assert end not in ids
  assert tokenizer.decode([end]) == ''
  assert tokenizer.decode([end, *ids, end]) == TEXT
  assert tokenizer.unknowns(TEXT) == []
  assert not tokenizer.standardizes
  assert tokenizer.encode('').shape == (0,)
  place = tokenizer.cut(TEXT[:-3])
  assert 0 < place <= len(TEXT) - 3
  assert [*tokenizer.encode(TEXT[:place]), *tokenizer.encode(TEXT[place:])] == ids.tolist()
  for outside in (-1, tokenizer.vocab_size):
    with pytest.raises(errors.UserError, match='outside the vocabulary'):
      tokenizer.decode([outside])
    with pytest.raises(errors.UserError, match='outside the vocabulary'):
      tokenizer.incremental_decoder().feed([outside])
  tokenizer.save(tmp_path / 'saved')
  loaded = build.load(tmp_path / 'saved')
  assert (loaded.fingerprint(), loaded.special_ids) == (tokenizer.fingerprint(), tokenizer.special_ids)
  assert loaded.encode(TEXT).tolist() == ids.tolist()


@pytest.mark.parametrize('kind', build.KINDS)
def test_a_stream_gives_the_whole_text(kind):
  tokenizer = build.train(CONFIGS[kind], [TEXT])
  ids, decoder = tokenizer.encode(TEXT), tokenizer.incremental_decoder()
  assert ''.join([decoder.feed([i]) for i in ids] + [decoder.flush()]) == TEXT


@pytest.mark.parametrize('kind', build.KINDS)
def test_spelling_gives_the_text_of_any_ids(kind):
  tokenizer, generator = build.train(CONFIGS[kind], [TEXT]), np.random.default_rng(0)
  spelling, end = tokenizer.spelling(), tokenizer.special_ids['end_of_text']
  assert spelling.next_CV.shape == (len(spelling.texts), tokenizer.vocab_size)
  assert {len(texts) for texts in spelling.texts} == {tokenizer.vocab_size}
  assert {texts[end] for texts in spelling.texts} == {b''}
  for _ in range(300):
    ids = generator.integers(tokenizer.vocab_size, size=generator.integers(12))
    decoder, context, data = tokenizer.incremental_decoder(), 0, b''
    for i in ids.tolist():
      data += spelling.texts[context][i]
      context = int(spelling.next_CV[context, i])
    assert data.decode('utf-8', 'replace') == tokenizer.decode(ids) == decoder.feed(ids) + decoder.flush()
    assert spelling.context(ids) == context


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (base.TokenizerConfig(kind='bite'), "tokenizer.kind='bite' is none of .* did you mean 'byte'"),
        (base.TokenizerConfig(kind=''), 'tokenizer.kind='),
        (base.TokenizerConfig(unknown_symbol='ab'), "unknown_symbol='ab' must be empty or one"),
        (base.TokenizerConfig(unknown_symbol='\ud800'), 'one character'),
        (base.TokenizerConfig(kind='word', vocab_size=-1), 'tokenizer.vocab_size=-1 is below 0'),
        (base.TokenizerConfig(kind='word', coverage=0.0), r'tokenizer.coverage=0.0 is not in \(0, 1\]'),
        (base.TokenizerConfig(kind='word', coverage=1.1), r'tokenizer.coverage=1.1 is not in \(0, 1\]'),
        (base.TokenizerConfig(kind='word', coverage=math.nan), r'tokenizer.coverage=nan is not in \(0, 1\]'),
        (base.TokenizerConfig(kind='sentencepiece', model_type='unigrm'), "model_type='unigrm' is none of .* did you mean 'unigram'"),
    ],
)
def test_wrong_configuration_is_named(config, message):
  with pytest.raises(errors.UserError, match=message):
    build.check(config)


OTHERS = {
    'unknown_symbol': '?', 'vocab_size': 300, 'coverage': 0.5, 'standardize': True, 'model_type': 'unigram', 'model_path': 'x.model'
}  # fmt: skip


@pytest.mark.parametrize('kind', build.KINDS)
@pytest.mark.parametrize('field', OTHERS)
def test_a_field_that_the_kind_does_not_read_is_refused(kind, field):
  config = base.TokenizerConfig(kind=kind, **{field: OTHERS[field]})
  if kind in build.READ_BY[field]:
    build.check(config)
  else:
    with pytest.raises(errors.UserError, match=f'tokenizer.{field}=.* is for tokenizer.kind=.* only, not {kind}'):
      build.check(config)


def test_every_field_is_read_by_some_kind():
  fields = {field.name for field in dataclasses.fields(base.TokenizerConfig)} - {'kind'}
  assert set(OTHERS) == set(build.READ_BY) == fields


def test_loads_what_is_good(tmp_path):
  (tmp_path / 'tokenizer.json').write_text(json.dumps(GOOD))
  assert build.load(tmp_path).decode([0, 1, 2]) == 'abc'


@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'{"kind": "char"',
        b'\xff\xfe',
        b'[' * 100_000,
        b'[]',
        b'{}',
        *(
            json.dumps(GOOD | change).encode()
            for change in (
                {'kind': 'pickle'},
                {'kind': 3},
                {'format': 1},
                {'format': base.FORMAT + 1},
                {'format': True},
                {'characters': 'aab'},
                {'characters': 'cba'},
                {'characters': ''},
                {'characters': ['a', 'b']},
                {'characters': 'a\ud800'},
                {'unknown_symbol': '??'},
                {'unknown_symbol': None},
            )
        ),
    ],
)
def test_broken_file_is_named(tmp_path, content):
  (tmp_path / 'tokenizer.json').write_bytes(content)
  with pytest.raises(errors.UserError, match=r'tokenizer\.json') as caught:
    build.load(tmp_path)
  assert '\n' not in str(caught.value)


def test_absurd_size_is_refused_unread(tmp_path):
  with open(tmp_path / 'tokenizer.json', 'wb') as file:
    file.truncate(base.MAX_FILE_BYTES + 1)
  with pytest.raises(errors.UserError, match=r'tokenizer\.json.* is too large: it has more than 67108864 bytes'):
    build.load(tmp_path)


def test_missing_file_is_named(tmp_path):
  with pytest.raises(errors.UserError, match=r"tokenizer\.json' can't be read: No such file"):
    build.load(tmp_path)
