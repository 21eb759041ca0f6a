import json

import pytest

from textgen_jax import errors
from textgen_jax.text import base, build

GOOD = {'format': 1, 'kind': 'char', 'characters': 'abc', 'unknown_symbol': '', 'document_start': 0}


@pytest.mark.parametrize('kind', build.KINDS)
def test_trains_the_kind_that_is_asked_for(kind):
  tokenizer = build.train(base.TokenizerConfig(kind=kind), ['some text'])
  assert tokenizer.kind == kind
  assert tokenizer.decode(tokenizer.encode('text')) == 'text'


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (base.TokenizerConfig(kind='bite'), 'tokenizer.kind=bite .* byte?'),
        (base.TokenizerConfig(kind=''), 'tokenizer.kind='),
        (base.TokenizerConfig(unknown_symbol='ab'), "unknown_symbol='ab' must be empty or one"),
        (base.TokenizerConfig(kind='byte', unknown_symbol='?'), 'char only'),
        (base.TokenizerConfig(unknown_symbol='\ud800'), 'one character'),
    ],
)
def test_wrong_configuration_is_named(config, message):
  with pytest.raises(errors.UserError, match=message):
    build.check(config)


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
                {'format': 2},
                {'format': True},
                {'characters': 'aab'},
                {'characters': 'cba'},
                {'characters': ''},
                {'characters': ['a', 'b']},
                {'characters': 'a\ud800'},
                {'unknown_symbol': '??'},
                {'document_start': 3},
                {'document_start': -1},
                {'document_start': True},
                {'document_start': 0.0},
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
  with pytest.raises(errors.UserError, match=r'tokenizer\.json has 67108865 bytes'):
    build.load(tmp_path)


def test_missing_file_is_named(tmp_path):
  with pytest.raises(errors.UserError, match=r'tokenizer\.json: No such file'):
    build.load(tmp_path)
