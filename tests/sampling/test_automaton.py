import itertools
import random
import re

import numpy as np
import pytest

from textgen_jax import errors
from textgen_jax.sampling import automaton

LETTERS = 'abcK\u212ak\u017f\u00e9\u00c9\n\u00df \U0001f600'
PATTERNS = [
  '', 'a', 'a*b?', '(ab|a)(bc|c)?', '[^ab]+', '(?i)aB', '(a|b)*?ab', 'a{2,3}b{,1}', '(?:a|ab){1,2}c?', '^a$|^b', r'\Aab?\Z', '(^a|b$)',
  '(?s).b.', '.b.', r'\w\W', r'(?a)\w\s?', '(a*)*b', '((a?b?)*c){0,2}', '(?i:K)b', '(?:)|a', '\u00e9+|\u00df', '(?i)\u00df', '(?i)\u00e9',
  '[\u00e0-\u00ff]b?', r'(?a)\w+', r'\d|\s|a', '(a|)+b', '(?:a?){3}b', '(?:a??b){2,}', r'[^\n]\n', '(?x) a b # c', '(?m)^a$',
  '(?-i:a)b', '(?i:a(?-i:b))', '(?P<one>a)+c', '(?i)[j-l]', '(?ai)[^k]', '(?i)[^k]', r'(?i)[^\Wk]', r'[\w\d\s]+', r'[^\S\n]', '(?i)s+',
  '(?:ab?){0,3}c', '(?:[ab]{1,2}c?){2}', 'a{0}', '(?:a{2}){2}', '(?:a{1,2}b?){1,2}', '\U0001f600|[\u0080-\uffff]', '(?u:\\w)(?a:\\w)',
]  # fmt: skip


def accepts(machine, text):
  state = automaton.walk(machine, text.encode())
  return state >= 0 and bool(machine.accepts_S[state])


def texts(letters, longest):
  return (''.join(text) for size in range(longest + 1) for text in itertools.product(letters, repeat=size))


@pytest.mark.parametrize('pattern', PATTERNS)
def test_accepts_what_python_matches(pattern):
  machine, compiled = automaton.build(pattern), re.compile(pattern)
  for text in texts(LETTERS, 3):
    assert accepts(machine, text) == bool(compiled.fullmatch(text)), text


def random_pattern(generator, depth):
  if depth == 0 or generator.random() < 0.15:
    return generator.choice(['a', 'b', 'c', '[ab]', '[^a]', '.', '', '(?i:A)'])
  parts = [random_pattern(generator, depth - 1) for _ in range(generator.randrange(1, 4))]
  body = generator.choice(['', '|']).join(parts)
  count = generator.choice(['', '', '*', '+', '?', '*?', '??', '{2}', '{1,3}', '{0,2}?', '{2,}', '{,5}'])
  return f'{generator.choice(["(?:", "("])}{body}){count}'


def test_accepts_what_python_matches_of_random_expressions():
  generator = random.Random(0)
  everything = list(texts('abc', 5))
  num_matches = num_refused = 0
  for _ in range(300):
    pattern = random_pattern(generator, 2)  # deeper ones keep Python busy for minutes
    try:
      machine, compiled = automaton.build(pattern), re.compile(pattern)
    except errors.UserError as error:
      assert 'needs more than' in str(error)  # noqa: PT017
      num_refused += 1
      continue
    for text in everything:
      matches = bool(compiled.fullmatch(text))
      num_matches += matches
      assert accepts(machine, text) == matches, (pattern, text)
  assert num_matches > 5_000
  assert num_refused < 10


@pytest.mark.parametrize('pattern', [r'\w', r'\W', r'\d', r'\S', '.', '(?i)k', '(?i)[^s-u]', r'(?i)[\u0130-\u0140\w]'])
def test_a_class_has_the_very_characters(pattern):
  machine, compiled = automaton.build(pattern), re.compile(pattern)
  for point in itertools.chain(range(0x3000), range(0xA000, 0xD800), range(0xE000, 0x30000, 3), range(0x30000, 0x110000, 997)):
    assert accepts(machine, chr(point)) == bool(compiled.fullmatch(chr(point))), hex(point)


def test_nothing_but_utf8_is_accepted():
  machine = automaton.build('(?s).')
  for data in itertools.chain(
    itertools.product(range(0x70, 0x100), repeat=2),
    itertools.product([*range(0xDC, 0x100)], range(0x7C, 0xC2), [0x7F, 0x80, 0xBF, 0xC0]),
    itertools.product(range(0xEE, 0x100), range(0x7C, 0xC2), [0x80, 0xBF], [0x7F, 0x80, 0xBF, 0xC0]),
  ):
    try:
      whole = len(bytes(data).decode()) == 1
    except UnicodeDecodeError:
      whole = False
    state = automaton.walk(machine, bytes(data))
    assert (state >= 0 and bool(machine.accepts_S[state])) == whole, bytes(data)


def test_an_alphabet_narrows_every_class():
  letters = frozenset(map(ord, 'ab\u00e9'))
  for pattern in (r'\w+', '.*', '[^a]b', 'c|a', '(?i)\u00c9'):
    machine, compiled = automaton.build(pattern, letters), re.compile(pattern)
    for text in texts('abc\u00e9\u00c9', 3):
      assert accepts(machine, text) == bool(compiled.fullmatch(text) and set(map(ord, text)) <= letters)
  assert len(automaton.build(r'\w+', letters).next_SN) < 5 < len(automaton.build(r'\w+').next_SN)


def test_nothing_matches_what_the_alphabet_lacks():
  machine = automaton.build('z', frozenset([97]))
  assert machine.next_SN.tolist() == [[-1] * 256]
  assert not machine.accepts_S.any()


def test_every_state_is_reached_and_leads_to_a_match_and_none_is_there_twice():
  for pattern in PATTERNS[::3]:
    machine = automaton.build(pattern)
    from_E, byte_E = np.nonzero(machine.next_SN >= 0)
    to_E = machine.next_SN[from_E, byte_E]
    assert (automaton.fewest_steps(to_E, from_E, machine.accepts_S) >= 0).all()
    assert (automaton.fewest_steps(from_E, to_E, np.arange(len(machine.next_SN)) == 0) >= 0).all()
    # Equal rows are the same state; what refinement would still merge shows as equal rows somewhere along the way.
    labels = machine.accepts_S.astype(int)
    for _ in range(len(labels)):
      rows = np.column_stack([labels, np.where(machine.next_SN >= 0, labels[machine.next_SN], -1)])
      labels = np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
    assert len(set(labels.tolist())) == len(labels), pattern


@pytest.mark.parametrize(
  ('pattern', 'repeated', 'end', 'most'),  # Python would try every way to share the characters out
  [
    ('(?:ab?){0,300}c', 'ab', 'c', 300),
    ('(?:a?b?c?){0,61}', 'cba', '', 30),  # c, b, ac, b, ac, b, a: 2 n + 1
    ('(?: ?[a-z]+,?){0,50}', ' ab', '', 50),
    ('(?:a|aa){0,200}', 'a', '', 400),
    ('(?:a{0,9}b){0,9}', 'aaaab', '', 9),
    ('(?:(?:.*){0,9}x){0,30}y', 'x' * 31, 'y', 10**9),
  ],
)
def test_counted_repeats_take_few_states_and_count_exactly(pattern, repeated, end, most):
  machine = automaton.build(pattern)
  assert len(machine.next_SN) < 1000
  for count in [0, 1, 5, 8, 9, 10, 11, 29, 30, 31, 49, 50, 51, 299, 300, 301, 399, 400, 401]:
    assert accepts(machine, repeated * count + end) == (count <= most)
  assert accepts(machine, end)


def test_fewest_steps_by_hand():
  from_E, to_E = np.array([3, 0, 1, 0, 2, 4]), np.array([0, 1, 2, 2, 3, 4])
  assert automaton.fewest_steps(from_E, to_E, np.array([True, False, False, False, False])).tolist() == [0, 1, 1, 2, -1]
  assert automaton.fewest_steps(from_E, to_E, np.array([False, True, False, True, False])).tolist() == [1, 0, 1, 0, -1]


@pytest.mark.parametrize(
  ('pattern', 'message'),
  [
    ('a(?=b)', 'has lookaround,'),
    ('(?<!b)a', 'has negative lookaround,'),
    ('(?!a)', 'negative lookaround'),
    (r'(a)\1', 'a backreference'),
    ('(?P<x>a)(?P=x)', 'a backreference'),
    ('(a)?(?(1)b|c)', 'a conditional group'),
    ('a++', 'a possessive repeat'),
    ('(?>a)', 'an atomic group'),
    (r'\ba', r'has \\b,'),
    (r'a\B', r'has \\B,'),
    ('a^b', r'\^ elsewhere than at its beginning'),
    ('(?:^a)*', r'\^ elsewhere'),
    (r'a\Ab', r'\\A elsewhere'),
    ('a$b', r'\$ elsewhere than at its end'),
    (r'a\Z\n', r'\\Z elsewhere'),
    ('(', 'is not a regular expression: missing'),
    ('a{3,2}', 'is not a regular expression: min repeat greater'),
    ('[z-a]', 'is not a regular expression: bad character range'),
    ('a{99999999999}', 'is not a regular expression: the repetition number is too large'),
    ('(' * 5000 + ')' * 5000, 'nested too deeply'),
  ],
)
def test_what_no_automaton_has_is_named(pattern, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    automaton.build(pattern)
  assert str(caught.value).startswith(f'regex={pattern!r:.200}')


@pytest.mark.parametrize(
  'pattern',
  ['a{1000000}', '.*a.{60}b', '(?:(?:a{1000}){1000}){1000}', '(?:a{0,1000}){0,1000}', 'a?' * 3000, '.{0,900}a.{0,900}', r'\w{100}'],
)
def test_what_takes_too_many_states_is_refused(pattern):
  with pytest.raises(errors.UserError, match=r'needs more than 16,384 states, .*\(\?a\)'):
    automaton.build(pattern)


def test_choices_are_accepted_and_nothing_else():
  listed = ['a', 'ab', 'b\u00e9', '\u00e9', 'ba', 'a']
  machine = automaton.choices(listed)
  for text in texts('ab\u00e9', 3):
    assert accepts(machine, text) == (text in listed)


def test_choices_that_cannot_be_are_refused(monkeypatch):
  with pytest.raises(errors.UserError, match=r"choices: 'a\\ud800' has '\\ud800', half a surrogate pair"):
    automaton.choices(['b', 'a\ud800'])
  monkeypatch.setattr(automaton, 'MAX_CHOICE_BYTES', 5)
  assert len(automaton.choices(['abc', 'abd']).next_SN) == 5
  with pytest.raises(errors.UserError, match='choices: the texts take more than 5 bytes'):
    automaton.choices(['abc', 'abde'])
