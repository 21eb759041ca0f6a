import json
import unicodedata

import numpy as np
import pytest

from textgen_jax import errors
from textgen_jax.text import base, build, word

ALPHABET = list('abzAQ019..,;:!?\'\'""()[]{}--_*`<>&$%#/\\|~@') + [' '] * 12 + ['\n'] * 5 + list('\t\r\x00\x0b\x1c\x85\xa0')
ALPHABET += list('éßİıΣσς世。、“”‘’«»…—–‐¿€½²Ⅷﬁ\u2028\u3000\U0001f600\U00020000')
ALPHABET += ['e\u0301', 'कि', *'\u0301\u0338\u0323\ufe0f\u200d']
WORDS = ["o'er", 'to-morrow', 'love', 'I', '<unk>', '<eol>', '<space>', '...', ' -- ', '.  ', "'tis", '"So,"', '3rd', 'H\u0331', 'ΑΣ']


def train(*texts, **fields):
  return build.train(base.TokenizerConfig(kind='word', **{'coverage': 1.0, **fields}), texts)


def shown(tokenizer, text):
  pieces = tokenizer.pieces()
  return [pieces[i] for i in tokenizer.encode(text)]


def random_texts(num, seed, longest=24):
  generator = np.random.default_rng(seed)
  choices = ALPHABET + WORDS
  return [''.join(choices[i] for i in generator.integers(len(choices), size=generator.integers(longest))) for _ in range(num)]


def known(num, seed):
  """Texts with a tokenizer that knows them all."""
  texts = random_texts(num, seed)
  return texts, train(*texts)


@pytest.mark.parametrize(
    ('text', 'pieces'),
    [
        ("o'er to-morrow, don't", ["o'er", 'to-morrow', ',', "don't"]),
        ('the 3rd of 1,000', ['the', '3rd', 'of', '1', ',', '<glue>', '000']),
        ('I am--nay...', ['I', 'am', '--', 'nay', '...']),
        ('I am -- nay ... no', ['I', 'am', '<space>', '--', '<space>', 'nay', '<space>', '...', 'no']),
        ('KING:\nCome\n\nout', ['KING', ':', '<eol>', 'Come', '<eol>', '<eol>', 'out']),
        (' a  b , c', ['<space>', 'a', '<space>', 'b', '<space>', ',', 'c']),
        ('a \n  b', ['a', '<space>', '<eol>', '<space>', '<space>', 'b']),
        ('a,b;c', ['a', ',', '<glue>', 'b', ';', '<glue>', 'c']),
        ('say (so [he]).', ['say', '(', 'so', '[', 'he', ']', ')', '.']),
        ('( a )', ['(', '<space>', 'a', '<space>', ')']),
        ('he said, "Go!" and', ['he', 'said', ',', '<open">', 'Go', '!', '"', 'and']),
        ("i' th' hall, 'tis", ['i', "'", 'th', "'", 'hall', ',', "<open'>", 'tis']),
        ('"\'Tis," she', ['<open">', "<open'>", 'Tis', ',', '"', 'she']),
        ('\u201cGo,\u201d he', ['\u201c', 'Go', ',', '\u201d', 'he']),
        ('it\u2019s $5 & 3%', ['it\u2019s', '$', '5', '&', '3', '%']),
        ('snake_case', ['snake', '_', '<glue>', 'case']),
        ('e\u0301te\u0301 x', ['e\u0301te\u0301', 'x']),
        ('\u0915\u093f\u0924\u093e\u092c', ['\u0915\u093f\u0924\u093e\u092c']),
        ('a\tb\xa0c', ['a', '\\t', 'b', '\\xa0', 'c']),
        ('<unk><eol>', ['<', '<glue>', 'unk', '<glue>', '>', '<glue>', '<', '<glue>', 'eol', '<glue>', '>']),
        ('-a a- -', ['-', '<glue>', 'a', 'a', '<glue>', '-', '-']),
        ('love ', ['love', '<glue>', '<space>']),
        ('no\n  ', ['no', '<eol>', '<space>', '<space>']),
        ('   ', ['<space>'] * 3),
        ('', []),
    ],
)
def test_splits_and_marks_what_the_rule_misses(text, pieces):
  tokenizer = train(text + ' a')
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert shown(tokenizer, text) == pieces
  assert tokenizer.decode(ids) == text


def test_decoding_inverts_encoding():
  texts, tokenizer = known(3000, 0)
  for text in texts:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.unknowns(text) == []


def test_parts_of_a_long_text_are_seamless(monkeypatch):
  texts, tokenizer = known(300, 1)
  text = ''.join(texts)
  whole, fingerprint = tokenizer.encode(text), train(text).fingerprint()
  monkeypatch.setattr(word, '_PART_CHARS', 7)
  assert tokenizer.encode(text).tolist() == whole.tolist()
  assert train(text).fingerprint() == fingerprint


def test_unknown_pieces_are_told_and_keep_their_place_and_spaces():
  generator = np.random.default_rng(2)
  words, symbols = ["o'er", 'to-day', 'I', 'é', '3rd'], list(',;!?()[]$"*_`/\\\t\r&\n\u201c\u201d\u2014\u0301') + ['--', '...']
  unknown_words, unknown_symbols = ['unk', "don't", 'ß'], list(':{}%~\u201e#\xa0')
  tokenizer = train(' '.join(words + symbols) + ' "a" *a* _a_ `a`')
  pieces = words + symbols + unknown_words + unknown_symbols
  for _ in range(1000):
    text, replaced, unknown, last = '', '', [], 'a'
    for piece in generator.choice(pieces, size=generator.integers(12)):
      touching = piece == '\u0301' or {piece, last} <= {*words, *unknown_words}
      # What would read as one piece is kept apart.
      gap = ' ' * generator.integers(touching or piece == last, 4)
      is_unknown = piece in unknown_words + unknown_symbols
      text, replaced, last = text + gap + piece, replaced + gap + ('<unk>' if is_unknown else piece), piece
      unknown += [piece] * is_unknown
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == replaced
    assert tokenizer.unknowns(text) == unknown
    assert (ids == tokenizer.special_ids['unknown']).sum() == len(unknown)


def test_an_unknown_piece_is_spaced_as_a_word():
  tokenizer = train('a b, "c"', vocab_size=8)
  assert tokenizer.pieces()[5:] == ['"', ',', 'a']
  assert shown(tokenizer, 'a zz zz, zz') == ['a', '<unk>', '<unk>', ',', '<unk>']
  assert shown(tokenizer, 'a: zz') == ['a', '<glue>', '<unk>', '<unk>']
  assert train('a').unknowns('"a" *a*') == ['"', '"', '*', '*']


def test_a_sign_known_in_one_use_is_known_in_both():
  tokenizer = train('a"')
  assert tokenizer.unknowns('"a" said') == ['said']
  assert tokenizer.decode(tokenizer.encode('"a" "a"')) == '"a" "a"'
  assert train('"a').decode(train('"a').encode('a" "a"')) == 'a" "a"'


@pytest.mark.parametrize(
    ('fields', 'words'),
    [
        # 10 pieces: c 4, b 3, and in the order of their code points comma, a, d 1 each.
        ({'coverage': 1.0}, ['c', 'b', ',', 'a', 'd']),
        ({'coverage': 0.4}, ['c']),
        ({'coverage': 0.41}, ['c', 'b']),
        ({'coverage': 0.7}, ['c', 'b']),
        ({'coverage': 0.71}, ['c', 'b', ',']),
        ({'coverage': 0.01}, ['c']),
        ({'vocab_size': 6}, ['c']),
        ({'vocab_size': 9, 'coverage': 0.1}, ['c', 'b', ',', 'a']),
        ({'vocab_size': 10}, ['c', 'b', ',', 'a', 'd']),
    ],
)
def test_the_most_frequent_words_are_chosen(fields, words):
  tokenizer = train('c b c\n', '\n\nb c b,\n', 'd a c\n', **fields)
  assert tokenizer.pieces() == ['<unk>', '<eol>', base.END_OF_TEXT, '<glue>', '<space>', *words]
  assert tokenizer.vocab_size == 5 + len(words)
  assert tokenizer.special_ids == {'unknown': 0, 'end_of_line': 1, 'end_of_text': 2, 'glue': 3, 'space': 4}


def test_coverage_is_exact_where_floating_point_is_not():
  assert 0.07 * 100 > 7
  tokenizer = train(' '.join(['a'] * 7 + [f'b{i}' for i in range(93)]), coverage=0.07)
  assert tokenizer.pieces()[5:] == ['a']


def test_counting_drops_the_rarest_when_there_are_too_many(monkeypatch):
  monkeypatch.setattr(word, '_MAX_COUNTED', 3)
  # Four distinct: b and d, seen once, go; they stay in the sum that coverage is of.
  assert train('a a a b\n', 'c c d\n').pieces()[5:] == ['a', 'c']
  assert train('a a a b\n', 'c c d\n', coverage=0.43).pieces()[5:] == ['a', 'c']
  assert train('a a b b c c d d d\n').pieces()[5:] == ['d']  # where that isn't enough, the next go too


@pytest.mark.parametrize(
    ('texts', 'fields', 'message'),
    [
        ([], {}, 'at least 1 word'),
        (['', ' \n\n'], {}, 'at least 1 word'),
        (['a b\n'], {'vocab_size': 50000}, r'vocab_size=50000 is above the 7 .*\(2 distinct words and symbols and 5 special ids\)'),
        (['a b\n'], {'vocab_size': 5}, 'vocab_size=5 leaves no id for a word: 5 are special'),
        (['a b\n'], {'vocab_size': 3, 'standardize': True}, '3 are special'),
        (['a b\n', 'ab\ud800'], {}, r"training text: character '\\ud800' at offset 2"),
    ],
)
def test_training_refuses(texts, fields, message):
  with pytest.raises(errors.UserError, match=message):
    train(*texts, **fields)


def test_a_vocabulary_that_no_file_could_hold_is_refused(monkeypatch):
  monkeypatch.setattr(base, 'MAX_FILE_BYTES', 200)
  with pytest.raises(errors.UserError, match=r'coverage=1.0 make a vocabulary of 100 words'):
    train(' '.join(f'word{i}' for i in range(100)))


@pytest.mark.parametrize('standardize', [False, True])
def test_half_a_surrogate_pair_is_an_error(standardize):
  tokenizer = train('ab "a"', standardize=standardize)
  for use in (tokenizer.encode, tokenizer.unknowns):
    with pytest.raises(errors.UserError, match=r"character '\\ud801' at offset 3"):
      use('ab \ud801')


@pytest.mark.parametrize('standardize', [False, True])
def test_a_text_cut_in_two_encodes_the_same(standardize):
  texts = random_texts(3000, 3)
  tokenizer = train(*texts, standardize=standardize, coverage=0.99)
  num_cut = 0
  for text, more in zip(texts, random_texts(3000, 4), strict=True):
    cut = tokenizer.cut(text)
    parts = [tokenizer.encode(text[:cut]), tokenizer.encode(text[cut:] + more)]
    assert np.concatenate(parts).tolist() == tokenizer.encode(text + more).tolist()
    num_cut += 0 < cut < len(text)
  assert num_cut > 900
  assert [tokenizer.cut(text) for text in ('', 'no line', 'a\n', 'a\nb\n c')] == [0, 0, 2, 4]


def test_stream_equals_whole_for_any_ids_and_any_cuts():
  generator = np.random.default_rng(5)
  tokenizer = train('to be, (or) "not"\n-- to be')
  glue, space, end = (tokenizer.special_ids[name] for name in ('glue', 'space', 'end_of_text'))
  for _ in range(1000):
    ids = generator.integers(tokenizer.vocab_size, size=12)
    decoder, parts, place = tokenizer.incremental_decoder(), [], 0
    while place < len(ids):
      size = generator.integers(4)
      parts.append(decoder.feed(ids[place : place + size]))
      place += size
    assert ''.join([*parts, decoder.flush()]) == tokenizer.decode(ids)
    assert decoder.feed(ids) == tokenizer.decode(ids)  # it started anew
  assert tokenizer.decode([space, glue, space, space]) == '   '
  a, b = tokenizer.encode('to').tolist(), tokenizer.encode('be').tolist()
  assert tokenizer.decode(a + [end] + b) == 'tobe'


def test_a_word_that_follows_trailing_spaces_adds_none():
  tokenizer = train('I love you, too')
  for prompt, more, expected in [
      ('I love', 'you', 'I love you'),
      ('I love ', 'you', 'I love you'),
      ('I love  ', 'you', 'I love  you'),
      ('I love, ', 'too', 'I love, too'),
      ('I love', ', too', 'I love, too'),
  ]:
    decoder = tokenizer.incremental_decoder()
    assert decoder.feed(tokenizer.encode(prompt)) == prompt
    assert prompt + decoder.feed(tokenizer.encode(more)) == expected


@pytest.mark.parametrize('ids', [[-1], [7], [0, 99]])
def test_ids_outside_the_vocabulary_are_refused(ids):
  with pytest.raises(errors.UserError, match='outside'):
    train('a b').decode(ids)


@pytest.mark.parametrize('standardize', [False, True])
def test_saves_and_loads(tmp_path, standardize):
  texts = random_texts(200, 6)
  tokenizer = train(*texts, standardize=standardize)
  tokenizer.save(tmp_path)
  loaded = build.load(tmp_path)
  assert loaded.fingerprint() == tokenizer.fingerprint()
  assert (loaded.special_ids, loaded.pieces(), loaded.standardizes) == (tokenizer.special_ids, tokenizer.pieces(), standardize)
  for text in texts:
    assert loaded.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_pieces_are_distinct_and_printable():
  pieces = train(*random_texts(1000, 7)).pieces()
  assert len(set(pieces)) == len(pieces)
  assert all(piece.isprintable() for piece in pieces)


def test_fingerprint_tells_vocabularies_apart():
  cases = [('a b', {}), ('b b a', {}), ('a b c', {}), ('a b', {'standardize': True}), ('a "', {}), ('"a', {})]
  assert len({train(text, **fields).fingerprint() for text, fields in cases}) == len(cases)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'words': 'ab'}, "words='ab' must be of type list"),
        ({'standardize': 1}, 'standardize=1 must be of type bool'),
        ({'words': []}, 'at least one, and distinct'),
        ({'words': ['a', 'b', 'a']}, 'at least one, and distinct'),
        ({'words': ['a', 3]}, r'words\[1\]=3 must be one word'),
        ({'words': ['']}, "words.0.='' must be one word"),
        ({'words': ['a b']}, "'a b' must be one word"),
        ({'words': ['a', ' a']}, "' a' must be one word"),
        ({'words': ['a!']}, "'a!' must be one word"),
        ({'words': ['\n']}, r"'\\n' must be one word"),
        ({'words': ['<unk>']}, "'<unk>' must be one word"),
        ({'words': ['\ud800']}, 'must be one word'),
        ({'words': ['a' + '\u0301' * 60 + '!']}, 'must be one word'),
    ],
)
def test_a_damaged_file_is_named(tmp_path, change, message):
  train('a "b"').save(tmp_path)
  path = tmp_path / 'tokenizer.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(errors.UserError, match=message) as caught:
    build.load(tmp_path)
  assert str(path) in str(caught.value)


def test_standardising_loses_what_it_says_and_is_told():
  tokenizer = train('to be ( or ) ﬁne, H\u0331', standardize=True)
  assert tokenizer.standardizes
  assert not train('a').standardizes
  assert shown(tokenizer, 'TO  be\t(OR)\u3000FINE,h\u1e96 \n\n') == ['to', 'be', '(', 'or', ')', 'fine', ',', '<unk>', '<eol>', '<eol>']
  assert tokenizer.decode(tokenizer.encode('To\u2003be(or ) fine ,H\u0331  ')) == 'to be (or) fine, \u1e96'
  assert tokenizer.unknowns('TO  Bee (Ⅷ)') == ['bee', 'viii']
  assert set(tokenizer.special_ids) == {'unknown', 'end_of_line', 'end_of_text'}


def test_standardising_twice_changes_nothing():
  points = [chr(point) for point in range(0x30000) if not 0xD800 <= point <= 0xDFFF]
  singles = [f'{point} {point}\u0331\u0301{point}' for point in points]
  for text in ['\n'.join(singles), *random_texts(1000, 8)]:
    once = word._standardize(text)
    assert word._standardize(once) == once
    assert unicodedata.is_normalized('NFKC', once)
    assert once.count('\n') == text.count('\n')


@pytest.mark.parametrize('standardize', [False, True])
def test_spelling_follows_the_spaces(standardize):
  generator = np.random.default_rng(9)
  tokenizer = train('to be, (or) "not"\n-- to be', standardize=standardize)
  spelling, to = tokenizer.spelling(), int(tokenizer.encode('to')[0])
  assert [texts[to] for texts in spelling.texts] == [b'to', b' to']
  for _ in range(1000):
    ids, context, data = generator.integers(tokenizer.vocab_size, size=12), 0, b''
    for i in ids.tolist():
      data += spelling.texts[context][i]
      context = int(spelling.next_CV[context, i])
    assert data.decode() == tokenizer.decode(ids)
