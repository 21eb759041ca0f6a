import base64
import io
import json
import pickle
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece as library

from textgen_jax import errors
from textgen_jax.text import base, build
from textgen_jax.text import sentencepiece as pieces

TYPES = ('bpe', 'unigram')
WORDS = 'the quick brown fox jumps over a lazy dog while seven wizards box quietly in damp caves'.split()
LITERALS = ['<s>', '</s>', '<unk>', '<0x41>', '<|endoftext|>', '<pad>', ' \u2047 ']
SPECIALS = ['\u2581', '\u2581\u2581', '\n', '\n\n', '\r', '\r\n', '\t', '\0', ' ', '   ', '\ufeff', '\ufffd', '\u2585', '\u00e9', 'e\u0301']
SPECIALS += ['\u00a0', '\u3000', '\uff21', '\u2028', '\x7f', '\ufdd0', '\U0001f600', '\U0010ffff', '\u4e16']


def config(model_type='bpe', **fields):
  return base.TokenizerConfig(kind='sentencepiece', model_type=model_type, **fields)


def training_text(num_lines=600, seed=0):
  generator = random.Random(seed)
  lines = []
  for _ in range(num_lines):
    line = ' '.join(generator.choices(WORDS, k=generator.randrange(12)))
    # Whatever a training text holds, pieces of it must come back from ids.
    lines.append(line + generator.choice(['', '', '', *SPECIALS, *LITERALS]) + generator.choice(['\n', '\n', '  \n', '\r\n', '\t\n']))
  return ''.join(lines)


def mixed_strings(count, seed):
  generator = random.Random(seed)
  for _ in range(count):
    yield ''.join(generator.choice([*WORDS, *WORDS, ' ', ' ', '\n', *SPECIALS, *LITERALS]) for _ in range(generator.randrange(25)))


def unicode_strings(count, seed):
  generator = np.random.default_rng(seed)
  for _ in range(count):
    # Half of all characters are of the first plane, where most of what is special stands.
    size = int(generator.integers(12))
    points = np.where(generator.random(size) < 0.5, generator.integers(0x10000, size=size), generator.integers(0x110000, size=size))
    points = points[(points < 0xD800) | (points > 0xDFFF)]
    yield ''.join(map(chr, points.tolist()))


@pytest.fixture(scope='module', params=TYPES)
def trained(request):
  return pieces.SentencePieceTokenizer.train(config(request.param, vocab_size=340), iter([training_text()]))


def train_library(lines=None, **fields):
  """A model as others make them."""
  written = io.BytesIO()
  fields = {'vocab_size': 120, 'model_type': 'unigram', 'hard_vocab_limit': False, 'minloglevel': 3} | fields
  lines = lines or [line for line in training_text().split('\n') if line.isascii()]
  library.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=written, **fields)
  return written.getvalue()


def foreign(tmp_path, model, **fields):
  path = tmp_path / 'foreign.model'
  path.write_bytes(model)
  return build.train(config(model_path=str(path), **fields), iter(()))


LLAMA = {'model_type': 'bpe', 'normalization_rule_name': 'identity', 'byte_fallback': True, 'remove_extra_whitespaces': False}
LLAMA |= {'vocab_size': 400}
GEMMA = LLAMA | {'add_dummy_prefix': False}


def test_decode_inverts_encode(trained):
  assert trained.vocab_size == 340
  special = set(trained.special_ids.values())
  for text in [*unicode_strings(10_000, 0), *mixed_strings(2_000, 0), *SPECIALS, *LITERALS, '']:
    ids = trained.encode(text)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert trained.decode(ids) == text
    assert not special & set(ids.tolist())
    assert trained.unknowns(text) == []


def test_pieces_are_longer_than_characters(trained):
  text = ' '.join(WORDS)
  assert len(trained.encode(text)) < len(text) / 2


def test_every_piece_decodes_and_no_piece_spans_a_line(trained):
  shown = trained.pieces()
  assert len(shown) == trained.vocab_size
  assert all(piece.isprintable() for piece in shown)
  assert shown[trained.special_ids['end_of_text']] == '<|endoftext|>'
  assert trained.decode([trained.special_ids['end_of_text']]) == ''
  texts = [trained.decode([i]) for i in range(trained.vocab_size)]
  assert [text for text in texts if '\n' in text] == ['\n', '\n']  # a symbol and a byte


def test_parts_that_end_at_a_cut_give_the_ids_of_the_whole(trained):
  generator = random.Random(1)
  cut_somewhere = 0
  for text in mixed_strings(1_000, 2):
    end = generator.randrange(len(text) + 1)
    cut = trained.cut(text[:end])
    assert 0 <= cut <= end
    cut_somewhere += cut > 0
    parts = [trained.encode(text[:cut]), trained.encode(text[cut:])]
    np.testing.assert_array_equal(np.concatenate(parts), trained.encode(text))
  assert cut_somewhere > 100


def test_ids_of_a_long_text_are_those_of_its_lines(trained):
  text = training_text(3_000, seed=5)
  parts = [trained.encode(line) for line in text.split('\n')]
  newline = trained.encode('\n')
  joined = np.concatenate([part for line in parts for part in (line, newline)])[:-1]
  np.testing.assert_array_equal(trained.encode(text), joined)


def test_bytes_that_are_no_utf8_come_back_from_an_argument(trained):
  ids = trained.encode(b'fox\xff\xc3 dog'.decode('utf-8', 'surrogateescape'))
  assert b''.join(trained._table[i] for i in ids) == b'fox\xff\xc3 dog'


def test_half_a_surrogate_pair_is_an_error(trained):
  with pytest.raises(errors.UserError, match=r"'\\ud800' at offset 2"):
    trained.encode('ab\ud800')


@pytest.mark.parametrize('prefixed', [False, True])
def test_stream_equals_whole_for_any_ids_and_any_chunks(trained, prefixed, tmp_path):
  tokenizer = foreign(tmp_path, train_library(**LLAMA)) if prefixed else trained
  generator = np.random.default_rng(3)
  texts = list(mixed_strings(150, 4))
  for index in range(300):
    ids = tokenizer.encode(texts[index]) if index < 150 else generator.integers(tokenizer.vocab_size, size=20)
    decoder, parts, place = tokenizer.incremental_decoder(), [], 0
    while place < len(ids):
      size = int(generator.integers(4))
      parts.append(decoder.feed(ids[place : place + size]))
      if index < 150:
        assert '\ufffd' not in parts[-1] or '\ufffd' in texts[index]
      place += size
    assert ''.join([*parts, decoder.flush()]) == tokenizer.decode(ids)


def test_stream_holds_back_half_a_character(trained):
  decoder = trained.incremental_decoder()
  ids = trained.encode('\U0001f60e')
  assert len(ids) == 4
  assert [decoder.feed([i]) for i in ids] == ['', '', '', '\U0001f60e']
  assert decoder.feed(ids[:2]) == ''
  assert decoder.flush() == '\ufffd'


@pytest.mark.parametrize('ids', [[-1], [340], [3, 4000]])
def test_ids_outside_the_vocabulary_are_refused(trained, ids):
  with pytest.raises(errors.UserError, match='outside'):
    trained.decode(ids)


def test_saves_loads_and_pickles(trained, tmp_path):
  trained.save(tmp_path)
  text = training_text(50, seed=9)
  for other in (build.load(tmp_path), pickle.loads(pickle.dumps(trained))):
    assert other.kind == 'sentencepiece'
    assert other.fingerprint() == trained.fingerprint()
    assert other.special_ids == trained.special_ids
    np.testing.assert_array_equal(other.encode(text), trained.encode(text))


@pytest.mark.parametrize('model_type', TYPES)
def test_another_process_learns_the_same(model_type):
  # Another process hashes otherwise, in Python and in the library.
  code = f"""
import sys; sys.path[:0] = {sys.path!r}
from textgen_jax.text import base, sentencepiece
config = base.TokenizerConfig(kind='sentencepiece', model_type={model_type!r}, vocab_size=330)
print(sentencepiece.SentencePieceTokenizer.train(config, iter([sys.stdin.buffer.read().decode()])).fingerprint())
"""
  done = subprocess.run([sys.executable, '-c', code], input=training_text().encode(), capture_output=True, check=True)
  tokenizer = pieces.SentencePieceTokenizer.train(config(model_type, vocab_size=330), iter([training_text()]))
  assert done.stdout.decode().strip() == tokenizer.fingerprint()
  assert done.stderr.decode().count('\n') == 1  # ours; the library is silent


def test_parts_of_documents_and_whole_documents_teach_the_same():
  text = training_text()
  lines = re.findall(r'.*\n', text)
  whole = pieces.SentencePieceTokenizer.train(config(vocab_size=330), iter([text]))
  parts = pieces.SentencePieceTokenizer.train(config(vocab_size=330), iter(lines))
  assert whole.fingerprint() == parts.fingerprint()


def test_documents_that_end_without_a_line_are_not_joined():
  assert list(pieces._blocks(['fox', 'dog\n', '', 'cat'])) == [b'fox\ndog\ncat\n']


def test_a_large_text_is_sampled_evenly_and_within_the_budget(monkeypatch):
  monkeypatch.setattr(pieces, 'TRAINING_BYTES', 20_000)
  monkeypatch.setattr(pieces, 'BLOCK_BYTES', 500)

  def texts():
    for i in range(4_000):
      yield f'line {i} of several thousand\n'

  blocks, kept, size = pieces._sample(texts())
  assert kept == sum(map(len, blocks))
  assert 5_000 < kept <= 20_000
  assert size == sum(map(len, texts()))
  numbers = [int(block.split()[1]) for block in blocks]
  gaps = np.diff(numbers)
  assert numbers[0] == 0
  assert numbers[-1] + gaps.max() >= 4_000
  assert gaps.max() <= 1.2 * gaps.min()
  assert pieces._sample(texts())[0] == blocks


def test_lines_that_the_library_would_drop_are_learned_from():
  for text in ['zebra ' * 5_000, *(f'{reserved}zebra zebra{reserved}zebra zebra\n' * 9 for reserved in '\0\u2581\u2585')]:
    tokenizer = pieces.SentencePieceTokenizer.train(config(), [text])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(' zebra').size == 1


@pytest.mark.parametrize('model_type', TYPES)
def test_the_largest_and_the_smallest_vocabulary_that_errors_name_work(model_type):
  text = training_text()
  for wanted, word in ((pieces.MAX_VOCAB_SIZE, 'above'), (50_000, 'above'), (5, 'below')):
    with pytest.raises(errors.UserError, match=rf'tokenizer\.vocab_size={wanted} is {word}') as caught:
      pieces.SentencePieceTokenizer.train(config(model_type, vocab_size=wanted), [text])
    limit = int(next(word for word in str(caught.value).replace(':', ' ').split(word)[1].split() if word.isdigit()))
    assert pieces.SentencePieceTokenizer.train(config(model_type, vocab_size=limit), [text]).vocab_size == limit
  assert 256 < pieces.SentencePieceTokenizer.train(config(model_type), [text]).vocab_size < pieces.DEFAULT_VOCAB_SIZE


@pytest.mark.parametrize('model_type', TYPES)
@pytest.mark.parametrize('texts', [[], [''], ['\n\n', '\t\n'], ['\u2581\0']])
def test_an_empty_training_text_is_an_error(model_type, texts):
  with pytest.raises(errors.UserError, match='at least 1 character'):
    pieces.SentencePieceTokenizer.train(config(model_type), iter(texts))


def test_a_vocabulary_beyond_the_library_is_an_error_before_the_text_is_read():
  with pytest.raises(errors.UserError, match=r'tokenizer\.vocab_size=1000000000000 is above 1048576'):
    pieces.SentencePieceTokenizer.train(config(vocab_size=10**12), iter(lambda: 1 / 0, None))


def test_a_surrogate_in_the_training_text_is_an_error():
  with pytest.raises(errors.UserError, match=r"'\\udc80'"):
    pieces.SentencePieceTokenizer.train(config(), ['fine\n', 'bad \udc80\n'])


def test_library_defaults_standardize(tmp_path):
  model = train_library()
  reference = library.SentencePieceProcessor(model_proto=model)
  tokenizer = foreign(tmp_path, model)
  assert tokenizer.standardizes
  assert tokenizer.vocab_size == reference.piece_size()
  assert tokenizer.special_ids == {'end_of_text': reference.eos_id(), 'unknown': reference.unk_id()}
  for text in mixed_strings(500, 6):
    ids = tokenizer.encode(text)
    assert ids.tolist() == reference.encode(text)
    assert tokenizer.decode(ids) == reference.decode(ids.tolist())
    assert tokenizer.cut(text) == 0
    assert len(tokenizer.unknowns(text)) == np.count_nonzero(ids == reference.unk_id())
  assert tokenizer.unknowns('fox \u4e16\u754c dog \u754c') == ['\u4e16\u754c', '\u754c']


@pytest.mark.parametrize('model_type', TYPES)
def test_a_dummy_prefix_is_added_and_dropped(tmp_path, model_type):
  model = train_library(**LLAMA | {'model_type': model_type})
  reference = library.SentencePieceProcessor(model_proto=model)
  tokenizer = foreign(tmp_path, model)
  assert not tokenizer.standardizes
  for text in [*mixed_strings(1_000, 7), '', ' ', '  fox', 'fox ', '\u2581fox', 'fox\u2581']:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.cut(text) == 0
    assert tokenizer.unknowns(text) == []
    if '\u2581' not in text:
      assert ids.tolist() == reference.encode(text)


@pytest.mark.parametrize('fields', [{}, {'user_defined_symbols': ['\n\n', '\u2581\u2581']}, {'user_defined_symbols': ['\nx']}])
def test_lossless_models_cut_where_no_piece_goes_on(tmp_path, fields):
  model = train_library(**GEMMA, **fields)
  reference = library.SentencePieceProcessor(model_proto=model)
  tokenizer = foreign(tmp_path, model)
  assert not tokenizer.standardizes
  generator = random.Random(8)
  cuts = 0
  for text in mixed_strings(1_000, 9):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    if '\u2581' not in text:
      assert ids.tolist() == reference.encode(text)
    cut = tokenizer.cut(text[: generator.randrange(len(text) + 1)])
    cuts += cut > 0
    np.testing.assert_array_equal(np.concatenate([tokenizer.encode(text[:cut]), tokenizer.encode(text[cut:])]), ids)
  assert (cuts > 100) == (fields.get('user_defined_symbols', ['\nx']) == ['\nx'])


def test_unknown_characters_of_a_lossless_model(tmp_path):
  model = train_library(**GEMMA | {'byte_fallback': False, 'vocab_size': 90})
  reference = library.SentencePieceProcessor(model_proto=model)
  tokenizer = foreign(tmp_path, model)
  unknown = tokenizer.special_ids['unknown']
  cuts = 0
  for text in mixed_strings(1_000, 10):
    ids = tokenizer.encode(text)
    lost = tokenizer.unknowns(text)
    if '\u2581' not in text:
      assert ids.tolist() == reference.encode(text)
    # What is known and what is lost make up the text.
    rest = iter(lost)
    assert ''.join(next(rest) if i == unknown else tokenizer.decode([i]) for i in ids) == text
    assert next(rest, None) is None
    cut = tokenizer.cut(text)
    cuts += cut > 0
    np.testing.assert_array_equal(np.concatenate([tokenizer.encode(text[:cut]), tokenizer.encode(text[cut:])]), ids)
  assert cuts > 100
  with pytest.raises(errors.UserError, match=r"'\\udc80' at offset 3"):
    tokenizer.encode('fox\udc80')


def test_a_model_that_knows_no_space_is_not_cut_at_one(tmp_path):
  tokenizer = foreign(tmp_path, train_library(lines=['fox', 'dog'] * 9, **GEMMA | {'byte_fallback': False}))
  assert tokenizer.unknowns('fox\u4e16 dog') == ['\u4e16 ']
  assert tokenizer.cut('fox\u4e16 dog') == 0


def test_a_model_without_an_end_gets_one(tmp_path):
  model = train_library(**GEMMA, eos_id=-1)
  tokenizer = foreign(tmp_path, model)
  size = library.SentencePieceProcessor(model_proto=model).piece_size()
  assert tokenizer.special_ids['end_of_text'] == size == tokenizer.vocab_size - 1
  assert tokenizer.decode([size]) == ''
  assert len(tokenizer.pieces()) == tokenizer.vocab_size
  assert foreign(tmp_path, model, vocab_size=size + 1).vocab_size == size + 1
  with pytest.raises(errors.UserError, match=rf"tokenizer\.vocab_size={size} isn't the {size + 1}"):
    foreign(tmp_path, model, vocab_size=size)


def test_an_end_that_text_can_spell_is_none(tmp_path):
  tokenizer = foreign(tmp_path, train_library(**GEMMA, eos_id=-1, user_defined_symbols=['</s>']))
  assert tokenizer.special_ids['end_of_text'] not in tokenizer.encode('a</s>b</s>')


@pytest.mark.parametrize('fields', [{'normalization_rule_name': 'nfkc'}, {'remove_extra_whitespaces': True}])
def test_what_loses_text_standardizes(tmp_path, fields):
  assert foreign(tmp_path, train_library(**GEMMA | fields)).standardizes


def test_a_foreign_model_saves_and_loads(tmp_path):
  tokenizer = foreign(tmp_path, train_library(**LLAMA))
  tokenizer.save(tmp_path)
  (tmp_path / 'foreign.model').unlink()
  loaded = build.load(tmp_path)
  assert loaded.fingerprint() == tokenizer.fingerprint()
  assert loaded.encode(' fox').tolist() == tokenizer.encode(' fox').tolist()


def damaged_models():
  model = train_library(**LLAMA)
  yield 'empty', b''
  yield 'text', b'no model at all, but a line of text\n' * 9
  yield 'half', model[: len(model) // 2]
  yield 'twice', model * 2
  yield 'zeros', bytes(999)


def test_files_that_are_no_model_are_the_users_error(tmp_path, monkeypatch, capfd):
  for name, data in damaged_models():
    with pytest.raises(errors.UserError, match=r'tokenizer\.model_path=.*foreign\.model: .*SentencePiece model') as caught:
      foreign(tmp_path, data)
    assert '\n' not in str(caught.value), name
  for path in (tmp_path / 'missing.model', tmp_path, 'nul\0'):
    with pytest.raises(errors.UserError, match=r"tokenizer\.model_path=.* can't be read"):
      build.train(config(model_path=str(path)), iter(()))
  model = train_library(**LLAMA)
  monkeypatch.setattr(pieces, 'MAX_MODEL_BYTES', len(model) - 1)
  with pytest.raises(errors.UserError, match=r'tokenizer\.model_path=.*too large'):
    foreign(tmp_path, model)
  assert capfd.readouterr().err == ''


def test_random_damage_is_an_error_or_a_model(tmp_path):
  model = train_library(**LLAMA)
  generator = random.Random(11)
  for _ in range(200):
    data = bytearray(model)
    for _ in range(generator.randrange(1, 4)):
      data[generator.randrange(len(data))] = generator.randrange(256)
    try:
      tokenizer = pieces.SentencePieceTokenizer(bytes(data))
    except errors.UserError:
      continue
    tokenizer.decode(tokenizer.encode('the quick brown fox\n'))


def test_a_damaged_tokenizer_file_is_named(trained, tmp_path):
  trained.save(tmp_path)
  path = tmp_path / base.FILE_NAME
  fields = json.loads(path.read_text())
  model = base64.b64decode(fields['model'])
  for damaged in ('!!!', '\u4e16', fields['model'][:-3], base64.b64encode(model[:-9]).decode(), ''):
    path.write_text(json.dumps(fields | {'model': damaged}))
    with pytest.raises(errors.UserError, match=r'tokenizer\.json: '):
      build.load(tmp_path)


def test_the_largest_model_fits_its_file():
  assert len(base64.b64encode(bytes(pieces.MAX_MODEL_BYTES))) + 100 < base.MAX_FILE_BYTES


@pytest.mark.parametrize('fields', [LLAMA, GEMMA, {}])
def test_spelling_drops_the_dummy_prefix_once(tmp_path, fields):
  tokenizer, generator = foreign(tmp_path, train_library(**fields)), np.random.default_rng(0)
  spelling = tokenizer.spelling()
  assert len(spelling.texts) == 2 - (fields == GEMMA)
  spaced = [i for i, text in enumerate(spelling.texts[-1]) if text.startswith(b' ') or not text]
  assert len(spaced) > 5
  for _ in range(1000):
    ids = [*generator.choice(spaced, generator.integers(4)), *generator.integers(tokenizer.vocab_size, size=generator.integers(5))]
    context, data = 0, b''
    for i in map(int, ids):
      data += spelling.texts[context][i]
      context = int(spelling.next_CV[context, i])
    assert data.decode('utf-8', 'replace') == tokenizer.decode(ids)
    assert context == spelling.context(ids)
