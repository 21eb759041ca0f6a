import dataclasses
import functools
import random
import re

import pytest

from textgen_jax import errors
from textgen_jax.sampling import stopping
from textgen_jax.text import base, byte, char, sentencepiece, word


@dataclasses.dataclass
class Rules:
  stop: tuple[str, ...] = ()
  stop_regex: str = ''
  lines: int = 0
  sentences: int = 0


ALPHABET = 'ab .!\n)"é世。…\U0001f600'
SPOKEN = 'a b. "a," b! (b a)\n a… b?\n\n"b a." a-b a... b\n.a b.\n  a 世。世 b。 é! ab ba.\n'


KINDS = ('byte', 'char', 'word', 'standardized', 'sentencepiece')
BYTE = byte.ByteTokenizer()


@functools.cache
def tokenizer_of(kind):
  words = base.TokenizerConfig(kind='word', coverage=1.0)
  return {
    'byte': lambda: BYTE,
    'char': lambda: char.CharTokenizer(ALPHABET, ''),
    'word': lambda: word.WordTokenizer.train(words, [SPOKEN]),
    'standardized': lambda: word.WordTokenizer.train(dataclasses.replace(words, standardize=True), [SPOKEN]),
    'sentencepiece': lambda: sentencepiece.SentencePieceTokenizer.train(base.TokenizerConfig(kind='sentencepiece'), [SPOKEN * 20]),
  }[kind]()


def random_ids(kind, generator, size):
  """Half of them spell a text, half are any: then there are characters cut in half, markers and ends."""
  tokenizer = tokenizer_of(kind)
  if generator.random() < 0.5:
    return tokenizer.encode(''.join(generator.choices(ALPHABET, k=size))).tolist()[:size]
  spelled = sorted(set(tokenizer.encode(ALPHABET * 2).tolist()))
  return [generator.choice(spelled) if generator.random() < 0.9 else generator.randrange(tokenizer.vocab_size) for _ in range(size)]


def naive_sentence_ends(text, final):
  """Written out a character at a time."""
  ends, at = [], 0
  while at < len(text):
    if text[at] not in '.!?…。！？':
      at += 1
      continue
    signs = at
    while at < len(text) and text[at] in '.!?…。！？':
      at += 1
    wide = any(sign in '。！？' for sign in text[signs:at])
    while at < len(text) and text[at] in '"\'”’»›)]}」』）】》〉〕］｝':
      at += 1
    if final if at == len(text) else text[at].isspace() or (wide and text[at] not in '.!?…。！？'):
      ends.append(at)
  return ends


def naive_end(text, rules, final):
  """(place, rule) where `text` would be cut; None: nowhere."""
  found = [(text.find(stop), 'stop') for stop in rules.stop if stop in text]
  if rules.stop_regex and (match := re.search(rules.stop_regex, text)):
    found.append((match.start(), 'stop'))
  newlines = [at for at, character in enumerate(text) if character == '\n']
  if 0 < rules.lines <= len(newlines):
    found.append((newlines[rules.lines - 1], 'lines'))
  sentences = naive_sentence_ends(text, final)
  if 0 < rules.sentences <= len(sentences):
    found.append((sentences[rules.sentences - 1], 'sentences'))
  return min(found, key=lambda end: end[0], default=None)


def naive(tokenizer, prompt, ids, rules):
  """(ids, text, rule): every beginning decoded anew and searched as a whole."""
  for size in range(1, len(ids) + 2):
    decoder = tokenizer.incremental_decoder()
    decoder.feed(prompt)
    text, final = decoder.feed(ids[:size]), size > len(ids)
    text += decoder.flush() if final else ''
    end = naive_end(text, rules, final)
    if end:
      return ids[:size], text[: end[0]], end[1]
  return ids, text, None


def outcome(text):
  return text.ids, text.text, text.stopped


def fed(tokenizer, prompt, ids, rules, sizes):
  """The outcome, fed in segments of `sizes`, and what a stream would have shown before the end; checks what streams need."""
  text, shown, at = stopping.Text(tokenizer, prompt, rules), '', 0
  for size in sizes:
    text.feed(ids[at : at + size])
    at += size
    ready = text.text[: text.ready()]
    assert ready.startswith(shown)  # nothing is taken back
    shown = ready
  assert at >= len(ids)
  text.flush()
  assert text.text.startswith(shown)
  assert text.ready() == len(text.text)
  before = outcome(text)
  text.flush()
  assert outcome(text) == before
  return before, shown


def random_sizes(generator, total, largest):
  sizes = []
  while sum(sizes) < total:
    sizes.append(generator.randrange(largest + 1))
  return sizes


REGEXES = ['b', r'a\s?b', r'\n\n', r'(?:a|b)[.!]', r'(?i)B\W{0,3}A', r'\n[ab]+[.!]', r'(a|b).\1', r'^a', r'(?m)^\W*\n', r'[^\x00-\x7f]']
REGEXES += ['\ufffd', r'a.*?b', r'(?s)a.*\n', r'(?<=a)b', r'(?<!a)b', r'(?<=\n\n)', r'(a)?(?(1)b|\.)', r'(?:(a)|b){2}(?(1)b|\.)']
# Each of these may match, and no more when the next character comes; or matches from long before the characters that tell.
FICKLE = [r'b$', r'\.$', r'(?m)b$', r'a\b', r'a\B.', r'b\Z', r'a(?=..b)', r'a(?!b)', r'b(?!\Z)', r'.(?<!ab)$', r'(?s).(?=(.*))\1']
FICKLE += [r'\bab\b', r'(?>[ab]+)(?<!aab)', r'a++(?<!aa)', r'(?>ab\.|a)b', r'(?:ab\.|a)++b', r'(?=(ab\.|a))\1b', r'(?=.{9}b)', r'a.{1,4}b$']
FICKLE += [r'a(?:$|\n)', r'a(?!.{0,3}\Z)', r'(?<=b$)']


def random_rules(generator, regexes):
  rules = Rules()
  while rules == Rules():
    if generator.random() < 0.4:
      stops = (''.join(generator.choices(ALPHABET, k=generator.randint(1, 4))) for _ in range(generator.randint(1, 3)))
      rules.stop = tuple(stops)
    if generator.random() < 0.6:
      rules.stop_regex = generator.choice(regexes)
    if generator.random() < 0.3:
      rules.lines = generator.randint(1, 4)
    if generator.random() < 0.3:
      rules.sentences = generator.randint(1, 4)
  return rules


@pytest.mark.parametrize('regexes', [REGEXES, FICKLE], ids=['lasting', 'fickle'])
@pytest.mark.parametrize('kind', KINDS)
def test_the_outcome_is_the_definition_s_however_ids_are_cut(kind, regexes):
  generator, tokenizer, reasons = random.Random(f'{kind}'), tokenizer_of(kind), set()
  for _ in range(300):
    prompt, ids = random_ids(kind, generator, generator.randrange(4)), random_ids(kind, generator, generator.randrange(40))
    rules = random_rules(generator, regexes)
    expected = naive(tokenizer, prompt, ids, rules)
    reasons.add(expected[2])
    for largest in (1, 3, 32, 100):
      sizes = [1] * len(ids) if largest == 1 else random_sizes(generator, len(ids), largest)
      assert fed(tokenizer, prompt, ids, rules, sizes)[0] == expected, (prompt, ids, rules, sizes)
  assert reasons == {'stop', 'lines', 'sentences', None}


@pytest.mark.parametrize('regex', REGEXES + FICKLE)
def test_each_expression_stops_where_the_definition_does_and_takes_nothing_back(regex):
  generator, stopped = random.Random(regex), 0
  for _ in range(150):
    ids = list(''.join(generator.choices('aab .\né', k=30)).encode())[: generator.randrange(31)]
    expected = naive(BYTE, [], ids, Rules(stop_regex=regex))
    stopped += expected[2] is not None
    for sizes in ([1] * len(ids), random_sizes(generator, len(ids), 6)):
      assert fed(BYTE, [], ids, Rules(stop_regex=regex), sizes)[0] == expected
  assert stopped > 10


@pytest.mark.parametrize('kind', KINDS)
def test_without_rules_the_text_is_the_decoder_s(kind):
  generator, tokenizer = random.Random(0), tokenizer_of(kind)
  for _ in range(50):
    ids = random_ids(kind, generator, 40)
    (kept, text, stopped), shown = fed(tokenizer, [], ids, Rules(), random_sizes(generator, 40, 9))
    assert (kept, text, stopped) == (ids, tokenizer.decode(ids), None)
    assert text.removesuffix('\ufffd') in (shown, shown.removesuffix('\ufffd'))  # only half a character waits


def ended(text, rules):
  """What becomes of `text`, a byte at a time and at once: (text, how many bytes, rule)."""
  ids = list(text.encode())
  (kept, made, stopped), _ = fed(BYTE, [], ids, rules, [1] * len(ids))
  assert fed(BYTE, [], ids, rules, [len(ids)])[0] == (kept, made, stopped)
  return made, len(kept), stopped


@pytest.mark.parametrize(
  ('text', 'n', 'expected'),
  [
    ('ab\ncd\nef', 1, ('ab', 3, 'lines')),
    ('ab\ncd\nef', 2, ('ab\ncd', 6, 'lines')),
    ('ab\ncd\nef', 3, ('ab\ncd\nef', 8, None)),
    ('\nab\n', 1, ('', 1, 'lines')),
    ('\n\n\nab', 3, ('\n\n', 3, 'lines')),
    ('', 1, ('', 0, None)),
  ],
)
def test_lines(text, n, expected):
  assert ended(text, Rules(lines=n)) == expected


@pytest.mark.parametrize(
  ('text', 'n', 'expected'),
  [
    ('He left. She stayed.', 1, ('He left.', 9, 'sentences')),
    ('He left. She stayed.', 2, ('He left. She stayed.', 20, 'sentences')),  # the end of the stream tells it
    ('He left. She stayed.', 3, ('He left. She stayed.', 20, None)),
    ('He left. She stayed', 2, ('He left. She stayed', 19, None)),
    ('He left.She stayed.', 1, ('He left.She stayed.', 19, 'sentences')),
    ('Pi is 3.14. So', 1, ('Pi is 3.14.', 12, 'sentences')),
    ('"Go!" he said. ', 1, ('"Go!"', 6, 'sentences')),
    ('(Go...).\nNow', 1, ('(Go...).', 9, 'sentences')),
    ('What?! No', 1, ('What?!', 7, 'sentences')),
    ('Well… no', 1, ('Well…', 8, 'sentences')),  # the sign has three bytes
    ('He said: “Go.”\n', 1, ('He said: “Go.”', 19, 'sentences')),
    ('Mr. Smith', 1, ('Mr.', 4, 'sentences')),
    ('a. b. c. ', 3, ('a. b. c.', 9, 'sentences')),
    ('好。他', 1, ('好。', 9, 'sentences')),
    ('“好！”他', 1, ('“好！”', 15, 'sentences')),
    ('「好。」。他', 1, ('「好。」。', 18, 'sentences')),
    ('好。', 1, ('好。', 6, 'sentences')),
    ('好!?。他', 1, ('好!?。', 11, 'sentences')),
    ('好。a. b', 2, ('好。a.', 9, 'sentences')),
    ('no end', 1, ('no end', 6, None)),
    ('', 1, ('', 0, None)),
  ],
)
def test_sentences(text, n, expected):
  assert ended(text, Rules(sentences=n)) == expected


@pytest.mark.parametrize(
  ('text', 'regex', 'expected'),
  [
    ('To be.\nHAMLET: Or', r'\n[A-Z]+:', ('To be.', 14, 'stop')),
    ('one 1 two 22 three', r'\d{2}', ('one 1 two ', 12, 'stop')),
    ('one\n\ntwo', r'(?<=\n\n)', ('one\n\n', 5, 'stop')),
    ('aab', r'a(?!a)', ('', 1, 'stop')),  # nothing follows when the first a comes
    ('xab', r'ab?', ('x', 2, 'stop')),
    ('abc', r'd', ('abc', 3, None)),
  ],
)
def test_expressions(text, regex, expected):
  ids = list(text.encode())
  assert fed(BYTE, [], ids, Rules(stop_regex=regex), [1] * len(ids))[0] == (ids[: expected[1]], expected[0], expected[2])


def test_of_the_rules_that_one_token_completes_the_earliest_cut_counts():
  words = tokenizer_of('word')
  ids = words.encode('a b!\n').tolist()  # the newline completes all of these
  for rules, expected in [
    (Rules(lines=1), ('a b!', 'lines')),
    (Rules(stop=('b!\n',), lines=1), ('a ', 'stop')),
    (Rules(stop=('\n',), lines=1), ('a b!', 'stop')),
    (Rules(stop=('\n',), sentences=1), ('a b!', 'stop')),
    (Rules(stop_regex=r'\s\w!\s', lines=1, sentences=1), ('a', 'stop')),
    (Rules(lines=1, sentences=1), ('a b!', 'lines')),
    (Rules(stop=('a b',), sentences=1), ('', 'stop')),  # completed before
  ]:
    text = stopping.Text(words, [], rules)
    text.feed(ids)
    assert (text.text, text.stopped) == expected


@pytest.mark.parametrize('rules', [Rules(stop=('a. ',)), Rules(stop_regex='a'), Rules(lines=1), Rules(sentences=1)], ids=str)
def test_no_rule_looks_into_the_prompt(rules):
  text = stopping.Text(BYTE, list(b'a\nb a.'), rules)
  text.feed(list(b' b'))
  text.flush()
  assert (text.text, text.stopped) == (' b', None)


def test_after_the_end_nothing_is_added():
  for rules in (Rules(stop=('b',)), Rules(stop_regex='b'), Rules(stop_regex='b$')):
    text = stopping.Text(BYTE, [], rules)
    for ids in (b'ab\xe4', b'c', b'b'):
      text.feed(list(ids))
    text.flush()
    assert (text.ids, text.text, text.stopped, text.ready()) == ([97, 98], 'a', 'stop', 1)


def test_what_the_end_of_the_stream_leaves_may_complete_a_rule():
  half = list('a世'.encode())[:3]
  for rules, expected in [
    (Rules(), ('a\ufffd', None)),
    (Rules(stop=('\ufffd',)), ('a', 'stop')),
    (Rules(stop_regex='.$(?<!a)'), ('a', 'stop')),
  ]:
    text = stopping.Text(BYTE, [], rules)
    text.feed(half)
    assert (text.text, text.stopped) == ('a', None)
    text.flush()
    assert (text.ids, text.text, text.stopped) == (half, *expected)


@pytest.mark.parametrize(
  ('rules', 'waits'),
  [
    (Rules(), 0),
    (Rules(stop=('x', 'xyz')), 2),
    (Rules(lines=3, sentences=9), 0),
    (Rules(stop_regex='xyz'), 2),
    (Rules(stop_regex=r'x[a-z]{2,5}', stop=('x',)), 5),
    (Rules(stop_regex=r'xyz$'), 4),
    (Rules(stop_regex=r'(?<=xy)'), 0),
    (Rules(stop_regex=r'x+'), 40),
    (Rules(stop_regex=r'x(?=y)'), 40),
  ],
  ids=str,
)
def test_how_much_waits(rules, waits):
  text = stopping.Text(BYTE, [], rules)
  text.feed(list(b'ab c' * 10))
  assert text.ready() == 40 - waits
  text.flush()
  assert text.ready() == 40


def test_degenerate_texts_take_linear_time():
  # Searches that begin anew at each sign would take 2 * 10**10 steps.
  for character in '.。)!':
    text = stopping.Text(BYTE, [], Rules(sentences=2, stop=('x',), lines=2))
    text.feed(list((character * 200_000).encode()))
    text.feed(list(b' '))
    assert (text.stopped, len(text.text)) == (None, 200_001)


@pytest.mark.parametrize(
  ('regex', 'constraint'),
  [('(', 'is not a regular expression'), ('a{9}{9}', 'is not a'), ('a*', 'matches the empty text'), ('$', 'matches'), ('x|', 'matches')],
)
def test_an_expression_that_cannot_be_meant_is_refused(regex, constraint):
  with pytest.raises(errors.UserError, match=f'^stop_regex={re.escape(repr(regex))} .*{constraint}') as caught:
    stopping.Text(BYTE, [], Rules(stop_regex=regex))
  assert '\n' not in str(caught.value)
