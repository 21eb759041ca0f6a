"""textgen_jax/statistics. Not tests/statistics/: a folder of that name beside conftest.py would compete with Python's own module."""

import builtins
import math
import random
import string

import pytest

from textgen_jax import errors
from textgen_jax.statistics import copies, loops, samples, words


def split(*texts):
  return [words.split(text) for text in texts]


def naive_longest(documents, sample):
  """Start and length of the longest piece that some document holds; the first of equals."""
  start, length = 0, 0
  for i in range(len(sample)):
    while i + length < len(sample) and any(sample[i : i + length + 1] in text for _, text in documents):
      start, length = i, length + 1
  return start, length


def naive_copies(documents, sample, at_least):
  """The longest piece, then the same of what is left of it and right of it."""
  start, length = naive_longest(documents, sample)
  if length < at_least:
    return []
  right = naive_copies(documents, sample[start + length :], at_least)
  return [*naive_copies(documents, sample[:start], at_least), (start, length), *((start + length + i, n) for i, n in right)]


def check_places(documents, sample, found):
  """Every copy stands where it says, and there first."""
  for copy in found:
    holders = [(name, text.find(copy.text)) for name, text in documents if copy.text in text]
    assert (copy.document, copy.document_offset) == holders[0]
    assert sample[copy.sample_offset : copy.sample_offset + len(copy)] == copy.text
    assert copy.occurrences == sum(text.startswith(copy.text, i) for _, text in documents for i in range(len(text)))


# One, two and four bytes in UTF-8, and half a surrogate pair, which can't be written at all.
ALPHABETS = ['a', 'ab', 'aé', 'b漢😀', 'a\ud800', string.ascii_lowercase]


@pytest.mark.parametrize('seed', range(200))
def test_copies_are_those_of_a_search_by_hand(seed):
  draw = random.Random(seed)
  alphabet = ALPHABETS[seed % len(ALPHABETS)]
  documents = [(str(i), ''.join(draw.choices(alphabet, k=draw.randrange(30)))) for i in range(draw.randrange(1, 4))]
  sample = ''.join(draw.choices(alphabet + 'z' * (seed % 2), k=draw.randrange(40)))
  if seed % 3 == 0:  # runs that are longer than the documents'
    documents.append(('run', alphabet * draw.randrange(6)))
    sample += alphabet * draw.randrange(12) + alphabet[0]
  index = copies.CopyIndex(documents)
  longest = index.longest(sample)
  start, length = naive_longest(documents, sample)
  assert (longest.sample_offset, len(longest)) == (start, length)
  if length:
    check_places(documents, sample, [longest])
  for at_least in (1, 2, 5):
    found = index.copies(sample, at_least)
    assert [(copy.sample_offset, len(copy)) for copy in found] == naive_copies(documents, sample, at_least)
    check_places(documents, sample, found)


def prose(draw, count):
  """Words with a letter of two bytes and a typographic quote among them."""
  known = [''.join(draw.choices(string.ascii_lowercase + 'é’', k=draw.randrange(2, 9))) for _ in range(300)]
  return draw.choices(known, k=count)


def test_planted_canaries_are_found_each_at_its_place():
  draw = random.Random(3)
  documents = [(f'play {i}', ' '.join(prose(draw, 3000))) for i in range(5)]
  canaries = [''.join(draw.choices(string.printable + 'éß—', k=draw.randint(60, 200))) for _ in range(20)]
  for canary in canaries:
    i = draw.randrange(len(documents))
    name, text = documents[i]
    at = draw.randrange(len(text))
    documents[i] = name, text[:at] + canary + text[at:]
  # Later plants move earlier ones, and may split one: those that are whole are looked up.
  places = {canary: (name, text.find(canary)) for canary in canaries for name, text in documents if canary in text}
  assert len(places) == 20
  shuffled = ' '.join(text for _, text in documents).split(' ')
  draw.shuffle(shuffled)
  sample = ''
  starts = {}
  for i, canary in enumerate(canaries):
    # Marks that no text holds keep chance from lengthening a canary.
    sample += ' '.join(shuffled[i * 50 : (i + 1) * 50]) + '\x00'
    starts[canary] = len(sample)
    sample += canary + '\x00'
  found = {copy.text: copy for copy in copies.CopyIndex(documents).copies(sample)}
  assert set(found) >= set(canaries)
  for canary in canaries:
    copy = found[canary]
    assert (copy.document, copy.document_offset, copy.sample_offset, copy.occurrences) == (*places[canary], starts[canary], 1)


@pytest.mark.parametrize('separator', ['', ' '])
def test_shuffled_text_holds_no_copy(separator):
  """Its characters shuffled, or its words."""
  draw = random.Random(4)
  text = ' '.join(prose(draw, 20000))
  index = copies.CopyIndex([('a', text)])
  parts = list(text) if not separator else text.split(separator)
  draw.shuffle(parts)
  sample = separator.join(parts)[:40000]
  assert index.copies(sample) == []
  assert 3 < len(index.longest(sample)) < 50
  assert [len(copy) for copy in index.copies(text)] == [len(text)]


def test_long_copies_and_long_runs_are_found_whole():
  """Quadratic work on the runs would take hours."""
  draw = random.Random(5)
  text = ''.join(draw.choices('ab ', k=60_000))
  index = copies.CopyIndex([('runs', 'a' * 100_000 + 'xy' * 50_000), ('noise', text)])
  long = index.copies('?' + text[1234:41_234] + '?' + text[:30_000])
  assert [(copy.sample_offset, len(copy), copy.document_offset) for copy in long] == [(1, 40_000, 1234), (40_002, 30_000, 0)]
  found = index.copies('a' * 250_000 + '?' + 'xy' * 120_000)
  assert [len(copy) for copy in found] == [100_000, 100_000, 50_000, 100_000, 100_000, 40_000]
  assert len(index.longest('?' + 'a' * 300_000)) == 100_000


def test_overlapping_copies_share_out_their_text():
  index = copies.CopyIndex([('one', 'abcdefgh'), ('two', 'ghijkl')])
  found = index.copies('abcdefghijkl', 4)
  assert [(copy.text, copy.document, copy.document_offset, copy.sample_offset) for copy in found] == [
    ('abcdefgh', 'one', 0, 0),
    ('ijkl', 'two', 2, 8),
  ]
  assert [copy.text for copy in index.copies('abcdefghijkl', 5)] == ['abcdefgh']  # four are left of the other


def test_no_copy_spans_two_documents():
  index = copies.CopyIndex([('one', 'abc'), ('empty', ''), ('two', 'def')])
  assert index.longest('abcdef') == copies.Copy('abc', 0, 'one', 0, 1)
  assert index.longest('xxdef\x00') == copies.Copy('def', 2, 'two', 0, 1)


@pytest.mark.parametrize('documents', [[], [('empty', '')], [('one', 'abc')]])
def test_nothing_in_common(documents):
  index = copies.CopyIndex(documents)
  for sample in ('', 'xyz'):
    assert index.longest(sample) == copies.Copy('', 0, '', 0, 0)
    assert index.copies(sample, 1) == []


@pytest.mark.parametrize('known', [253, 254, 255, 256, 1000])
def test_many_different_characters(known):
  """At and past what a byte can number, beside the separator and what only a sample has."""
  text = ''.join(map(chr, range(0x4E00, 0x4E00 + known)))
  index = copies.CopyIndex([('some', text[:10] * 3), ('all', text)])
  copy = index.longest('zz' + text[100:] + 'zz')
  assert (copy.document, copy.document_offset, copy.sample_offset, copy.text) == ('all', 100, 2, text[100:])
  assert index.longest('z') == copies.Copy('', 0, '', 0, 0)


def test_copies_refuse(monkeypatch):
  with pytest.raises(errors.UserError, match='at_least=0 is not at least 1'):
    copies.CopyIndex([('a', 'abc')]).copies('abc', 0)
  monkeypatch.setattr(copies, 'MAX_BYTES', 7)
  copies.CopyIndex([('a', 'abcdef')])
  with pytest.raises(errors.UserError, match='takes 8 bytes: copies are found in at most 7'):
    copies.CopyIndex([('a', 'abc'), ('b', 'abc')])


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
  real = builtins.__import__

  def without(name, *rest):
    if name == 'pydivsufsort':
      raise ImportError(name)
    return real(name, *rest)

  monkeypatch.setattr(builtins, '__import__', without)
  with pytest.raises(errors.UserError, match=r"pip install 'textgen_jax\[inspect\]'"):
    copies.CopyIndex([('a', 'abc')])


def test_words():
  assert words.split("ROMEO: I'll go—\n3 times.") == ['ROMEO', ':', 'I', "'", 'll', 'go', '—', '3', 'times', '.']
  assert words.cut([['a', 'b'], ['c', 'd'], ['e']], 3) == [['a', 'b'], ['c']]


def test_distinct_n_by_hand():
  samples = split('a b a b', 'a b')  # 6 words; bigrams ab ba ab, ab
  assert words.distinct_n(samples, 1) == 2 / 6
  assert words.distinct_n(samples, 2) == 2 / 6  # none spans two samples
  assert words.distinct_n(samples, 3) == 2 / 6
  assert words.distinct_n(samples, 4) == 1 / 6
  assert words.distinct_n([[]], 1) is None


def test_repetition_by_hand():
  # 8 words, 5 four-grams: abcd bcda cdab dabc abcd; the last repeats the first.
  assert words.repetition(split('a b c d a b c d')) == pytest.approx(1 / 5)
  # Three words have no four-gram, so they don't count; one that never repeats counts as 0.
  assert words.repetition(split('a b c d a b c d', 'a a a', 'a b c d e')) == pytest.approx(1 / 10)
  assert words.repetition(split('a ' * 103)) == pytest.approx(0.99)
  assert words.repetition(split('a b c')) is None


@pytest.mark.parametrize('exponent', [0.5, 1, 2])
def test_zipf_slope_of_a_law(exponent):
  """Frequencies that follow a power law give its exponent; words that occur once are left out."""
  counts = [round(100_000 / rank**exponent) for rank in range(1, 31)]
  sample = [str(word) for word, count in enumerate(counts) for _ in range(count)]
  fit = words.zipf([sample, [f'once {i}' for i in range(500)]])
  assert fit.slope == pytest.approx(-exponent, rel=1e-3)
  assert fit.ranks == 30
  assert words.zipf([sample], most_ranks=10).ranks == 10
  assert words.zipf(split('a a b b c')) is None


def test_novelty_by_hand():
  index = words.NgramIndex(split('a b c', 'c d'))
  # Words: a b c d e. Bigrams: ab bc cd de, of which de is new; cd is there. Trigrams: abc is there, bcd spans documents.
  *shares, none = index.novelty(split('a b c d e'), 6)
  assert shares == pytest.approx([1 / 5, 1 / 4, 2 / 3, 1, 1])
  assert none is None
  assert index.novelty([[]], 1) == [None]
  assert words.NgramIndex([]).novelty(split('a b'), 2) == [1, 1]


@pytest.mark.parametrize('seed', range(20))
def test_novelty_is_that_of_sets(seed):
  draw = random.Random(seed)
  training = [draw.choices('abc', k=draw.randrange(60)) for _ in range(3)]
  samples = [draw.choices('abcd' if seed % 2 else 'abc', k=draw.randrange(30)) for _ in range(4)]
  for n, share in enumerate(words.NgramIndex(training).novelty(samples), start=1):
    known = {gram for document in training for gram in words.ngrams(document, n)}
    grams = [gram for sample in samples for gram in words.ngrams(sample, n)]
    expected = sum(gram not in known for gram in grams) / len(grams) if grams else math.nan
    assert (math.nan if share is None else share) == pytest.approx(expected, nan_ok=True)


def naive_loop(sequence, repeats, at_least):
  """By trying every period, and every length of it."""
  for period in range(1, len(sequence) + 1):
    length = period
    while length < len(sequence) and sequence[-length - 1] == sequence[-length - 1 + period]:
      length += 1
    if length >= max(at_least, repeats * period):
      return loops.Loop(period, length)
  return None


@pytest.mark.parametrize('seed', range(200))
def test_loops_are_those_of_a_search_by_hand(seed):
  draw = random.Random(seed)
  text = ''.join(draw.choices('ab'[: 1 + seed % 2] + 'c', k=draw.randrange(12)))
  if seed % 3:
    text += ''.join(draw.choices('abc', k=draw.randrange(1, 6))) * draw.randrange(1, 6)
    text += text[: draw.randrange(3)]
  for repeats in (2, 3, 5):
    for at_least in (1, 4, 10):
      assert loops.tail(text, repeats, at_least) == naive_loop(text, repeats, at_least)
  z = loops.z_function(text)
  assert z == [max(n for n in range(len(text) - i + 1) if text[:n] == text[i : i + n]) for i in range(len(text))]


def test_loops_by_hand():
  phrase = 'of the stands, '  # 15 characters
  assert loops.tail('The soul—' + phrase * 3) == loops.Loop(15, 45)
  assert loops.tail('The soul—' + phrase * 3 + 'of th') == loops.Loop(15, 50)  # within the fourth round
  assert loops.tail('The soul—' + phrase * 2 + 'of the stand') is None
  assert loops.tail(phrase * 9 + 'and then it ends') is None  # it came out of it
  assert loops.tail('Never, never, never!') is None
  assert loops.tail('-' * 23) is None
  assert loops.tail('-' * 24) == loops.Loop(1, 24)
  assert loops.tail('') is None
  assert loops.tail([1, 2, 3] * 8) == loops.Loop(3, 24)  # ids too
  assert loops.tail('ab' * 100_000 + 'a') == loops.Loop(2, 200_001)  # quadratic work would take hours


def test_statistics_of_samples_by_hand():
  yardstick = samples.Yardstick(compared_words=4, known_words={'a', 'b', 'c', 'd'})
  first = samples.Sample('a b a b a b e', entropy=1.0, log_prob=-2.0, drawn_entropy=0.5)
  short = samples.Sample('a b x', entropy=3.0, log_prob=-1.0)
  looping = samples.Sample('d ' * 12, entropy=2.0, log_prob=-0.5, drawn_entropy=1.5)
  row = samples.row('T=1', 'temperature', 1.0, [first, short, looping], yardstick)
  found = row.statistics
  assert found['entropy'] == (2, pytest.approx(1 / math.sqrt(3)), 3)  # 1, 3, 2: a standard deviation of 1
  assert found['drawn_entropy'] == (1, pytest.approx(0.5), 2)  # 0.5 and 1.5: of sqrt(1/2), over sqrt(2)
  assert found['distinct_1'] == (pytest.approx((2 / 4 + 1 / 4) / 2), pytest.approx(1 / 8), 2)  # the short one has no four words
  assert found['distinct_2'].mean == pytest.approx((2 / 4 + 1 / 4) / 2)  # ab ba, dd
  assert found['new_words'].mean == pytest.approx((1 / 7 + 1 / 3 + 0) / 3)
  assert found['repeated_4_grams'] == (pytest.approx((1 / 4 + 8 / 9) / 2), pytest.approx((8 / 9 - 1 / 4) / 2), 2)  # abab baba abab babe
  assert found['loops'].mean == pytest.approx(1 / 3)
  none = samples.row('T=0', 'temperature', 0.0, [short], yardstick).statistics
  assert (none['distinct_1'], none['drawn_entropy'], none['entropy']) == (None, None, (3, None, 1))
  assert samples.words_to_compare(['a b c d e', 'a b c']) == 2
  assert samples.words_to_compare(['', 'a']) == 1
