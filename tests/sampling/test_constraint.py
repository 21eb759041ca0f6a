import io
import itertools
import re

import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece as library

from textgen_jax import errors
from textgen_jax.sampling import batch, constraint, history, params
from textgen_jax.text import base, build, byte, char, word

DEEP = 4  # tokens of a sequence


def compiled(tokenizer, asked, size):
  """Of pairs (regex, choices)."""
  return constraint.compile_constraints(tokenizer, [constraint.Wanted(*one) for one in asked], size)


def pieces():
  config = base.TokenizerConfig(kind='sentencepiece', vocab_size=280, model_type='bpe')
  return build.train(config, ['some text, and some more text: the text of some\n' * 20])


TOKENIZERS = {
  'char': char.CharTokenizer('\nab\u00e9', ''),
  'char with unknown': char.CharTokenizer('ab', 'b'),
  'word': word.WordTokenizer(['a', 'ab', ',', '('], False),
  'standardized word': word.WordTokenizer(['a', 'b', ','], True),
}
CASES = [
  *((kind, pattern) for kind in ('char', 'char with unknown') for pattern in ('a*', 'ab|b', '[ab]{2,3}', '.', '(?i)A+b?', 'b{2}|a', '')),
  *(('char', pattern) for pattern in (r'\w+', r'[^a]\n?', '(a\u00e9){1,2}')),
  *(('word', pattern) for pattern in ('a', ' a', 'a a', '( ?a,?)+', 'a +ab', r'\(a', ' *', r'.+\n', 'aa|,')),
  *(('standardized word', pattern) for pattern in ('(a b?)+', '( a| b)*', ',|a', '.*', ' a| b')),
]


def prompts_of(tokenizer):
  """One that leaves each context."""
  spelling = tokenizer.spelling()
  prompts = {spelling.context(ids): list(ids) for n in (2, 1, 0) for ids in itertools.product(range(tokenizer.vocab_size), repeat=n)}
  assert sorted(prompts) == list(range(len(spelling.texts)))
  return list(prompts.values())


def continuation(tokenizer, prompt, ids):
  decoder = tokenizer.incremental_decoder()
  decoder.feed(prompt)
  return decoder.feed(ids) + decoder.flush()


def run(table, state, ids):
  for i in ids:
    state = state if state < 0 else int(table.next_SC[state, table.column_V[i]])
  return state


def allowed_tokens(tokenizer):
  return [i for i in range(tokenizer.vocab_size) if i not in (tokenizer.special_ids['end_of_text'], tokenizer.special_ids.get('unknown'))]


def writes(tokenizer, prompt, ids):
  """Whether every token adds text, or changes how the next one is spelled."""
  spelling = tokenizer.spelling()
  context = spelling.context(prompt)
  for i in ids:
    following = int(spelling.next_CV[context, i])
    if not spelling.texts[context][i] and following == context:
      return False
    context = following
  return True


@pytest.mark.parametrize(('kind', 'pattern'), CASES)
def test_just_the_sequences_that_match_are_accepted(kind, pattern):
  tokenizer = TOKENIZERS[kind]
  pattern = pattern or '(?:)'
  built = compiled(tokenizer, [(pattern, ())], 16)
  table, end, num_matches = built.table, tokenizer.special_ids['end_of_text'], 0
  for prompt in prompts_of(tokenizer):
    matching = [
      ids
      for size in range(DEEP + 1)
      for ids in itertools.product(allowed_tokens(tokenizer), repeat=size)
      if writes(tokenizer, prompt, ids) and re.fullmatch(pattern, continuation(tokenizer, prompt, ids))
    ]
    if not matching:
      with pytest.raises(errors.UserError, match='matches no text that this vocabulary can spell, after this prompt'):
        built.start(0, prompt)
      continue
    start = built.start(0, prompt)
    num_matches += len(matching)
    accepted, beginnings = set(matching), {ids[:n] for ids in matching for n in range(len(ids) + 1)}
    for size in range(DEEP + 1):
      for ids in itertools.product(allowed_tokens(tokenizer), repeat=size):
        state = run(table, start, ids)
        assert (state >= 0 and table.distance_S[state] == 0) == (ids in accepted)
        if state >= 0:  # the match may lie beyond the sequences that we look at
          nearest = min((len(other) - size for other in accepted if other[:size] == ids), default=DEEP + 1)
          assert table.distance_S[state] == nearest if nearest <= DEEP else table.distance_S[state] > DEEP - size
        else:
          assert ids not in beginnings
        after_end = run(table, state, [end])
        assert after_end == (constraint.ENDED if ids in accepted else -1)
  assert num_matches


def test_after_the_end_comes_only_the_end_and_free_rows_take_everything():
  tokenizer = TOKENIZERS['char with unknown']  # ids a b unknown end
  built = compiled(tokenizer, [('', ()), ('a', ())], 8)
  next_SV = built.table.next_SC[:, built.table.column_V]
  assert next_SV[constraint.FREE].tolist() == [constraint.FREE] * 4 + [-1] * 4
  assert next_SV[constraint.ENDED].tolist() == [-1] * 3 + [constraint.ENDED] + [-1] * 4
  assert built.start(0, []) == constraint.FREE
  assert built.fewest_tokens(built.start(0, [])) == built.fewest_tokens(constraint.ENDED) == 0
  assert built.fewest_tokens(built.start(1, [1])) == 1
  assert (next_SV[2:, 4:] == -1).all()
  assert (next_SV[2:, 2] == -1).all()  # unknown, though it is spelled 'b'


def test_several_constraints_keep_apart_and_equal_ones_share():
  tokenizer = TOKENIZERS['char']
  asked = [('a+', ()), ('', ('ab', 'b')), ('a+', ()), ('', ()), ('[^b]*b', ())]
  built = compiled(tokenizer, asked, 8)
  starts = [built.start(i, []) for i in range(len(asked))]
  assert starts[0] == starts[2]
  assert len(set(starts)) == 4
  for one, start in zip(asked, starts, strict=True):
    alone = compiled(tokenizer, [one], 8)
    for ids in itertools.product(range(tokenizer.vocab_size), repeat=3):
      together, apart = run(built.table, start, ids), run(alone.table, alone.start(0, []), ids)
      assert (together >= 0) == (apart >= 0)
      if together >= 0:
        assert built.table.distance_S[together] == alone.table.distance_S[apart]


@pytest.mark.parametrize('tokenizer', [byte.ByteTokenizer(), pieces()], ids=['byte', 'sentencepiece'])
@pytest.mark.parametrize(
  'one',
  [
    (r'\w{2,5}', ()), ('some( text)*', ()), ('[\u00e0-\u00ff\u4e00]+', ()), (r'(?i)THE.*[^\x00-\x7f]', ()), ('(?s).{3}', ()),
    ('', ('some text', 'some', 'na\u00efve \U0001f600')),
  ],
)  # fmt: skip
def test_random_walks_match_and_end_in_time(tokenizer, one):
  generator = np.random.default_rng(0)
  built = compiled(tokenizer, [one], tokenizer.vocab_size)
  table, end, texts = built.table, tokenizer.special_ids['end_of_text'], set()
  for _ in range(60):
    state, ids = built.start(0, [end]), []
    remaining = built.fewest_tokens(state) + int(generator.integers(12))
    for left in range(remaining, 0, -1):
      next_V = table.next_SC[state][table.column_V]
      likely = np.flatnonzero((next_V >= 0) & (table.distance_S[next_V] <= left - 1))
      assert likely.size
      token = int(generator.choice(likely))
      state = int(next_V[token])
      if token == end:
        break
      ids.append(token)
    text = tokenizer.decode(ids)
    assert table.distance_S[state] == 0
    assert text in one[1] if one[1] else re.fullmatch(one[0], text)
    texts.add(text)
  assert len(texts) > 1


def test_every_token_that_may_follow_is_allowed():
  tokenizer = pieces()
  pattern, spelling = 'some .*', tokenizer.spelling()
  built = compiled(tokenizer, [(pattern, ())], tokenizer.vocab_size)
  state = run(built.table, built.start(0, []), tokenizer.encode('some '))
  for token, text in enumerate(spelling.texts[0]):
    whole = b'some '.startswith(text) or text.decode('utf-8', 'ignore').encode() == text
    if text and whole and token not in tokenizer.special_ids.values():
      assert (run(built.table, state, [token]) >= 0) == (b'\n' not in text)


def test_the_first_word_after_a_dummy_prefix_has_no_space(tmp_path):
  written = io.BytesIO()
  library.SentencePieceTrainer.train(
    sentence_iterator=iter(['one two three two one'] * 9), model_writer=written, vocab_size=30, hard_vocab_limit=False, minloglevel=3,
    normalization_rule_name='identity', remove_extra_whitespaces=False, model_type='unigram',
  )  # fmt: skip
  path = tmp_path / 'prefixed.model'
  path.write_bytes(written.getvalue())
  tokenizer = build.train(base.TokenizerConfig(kind='sentencepiece', model_path=str(path)), [])
  built = compiled(tokenizer, [('two( one)*', ())], tokenizer.vocab_size)
  assert run(built.table, built.start(0, []), tokenizer.encode('two one')) >= 0
  assert run(built.table, built.start(0, tokenizer.encode('one')), tokenizer.encode('two one')) == -1  # it would be ' two one'


def test_what_cannot_be_spelled_is_an_error():
  tokenizer = TOKENIZERS['char']
  with pytest.raises(errors.UserError, match=r"^regex='z\+' matches no text that this vocabulary can spell$"):
    compiled(tokenizer, [('a', ()), ('z+', ())], 8)
  with pytest.raises(errors.UserError, match=r"^choices: this vocabulary can't spell 'za'$"):
    compiled(tokenizer, [('', ('ab', 'za', 'zb'))], 8)
  with pytest.raises(errors.UserError, match=r"^choices: this vocabulary can't spell 'b'$"):  # 'b' only starts a longer choice
    compiled(TOKENIZERS['word'], [('', ('a', 'b'))], 16)
  spaced = compiled(TOKENIZERS['standardized word'], [('', ('a', ','))], 8)
  assert spaced.start(0, []) >= 2
  with pytest.raises(errors.UserError, match=r"can't spell 'a', after this prompt$"):
    spaced.start(0, TOKENIZERS['standardized word'].encode('b'))


def test_tables_that_are_too_large_are_refused(monkeypatch):
  tokenizer = byte.ByteTokenizer()
  monkeypatch.setattr(constraint, 'MAX_MOVES', 100)
  with pytest.raises(errors.UserError, match='too large for this vocabulary: its 101 states and 257 tokens allow more than 100 moves'):
    compiled(tokenizer, [('[a-c]*d[a-j]{0,99}', ())], 257)
  monkeypatch.undo()
  monkeypatch.setattr(constraint, 'MAX_ENTRIES', 1000)
  with pytest.raises(errors.UserError, match='the table of all rows takes 128 states times 8 kinds of tokens'):
    compiled(tokenizer, [('[0-9a]{9}', ()), ('a{100}b', ())], 257)


def test_constraints_of_about_one_size_have_tables_of_one_shape():
  shapes = set()
  for pattern in ('[ab]{20}', 'a{25}', '[^a]{3}b{19}'):
    table = compiled(TOKENIZERS['char'], [(pattern, ())], 8).table
    shapes.add((table.next_SC.shape, table.distance_S.shape, table.column_V.shape))
    assert [leaf.dtype for leaf in table] == [np.int32] * 3
  assert shapes == {((32, 8), (32,), (8,))}


def test_allow_and_advance_follow_the_table():
  tokenizer = TOKENIZERS['char']  # ids \n a b é end
  built = compiled(tokenizer, [('', ()), ('a(b|bab)', ()), ('b?', ())], 8)
  table = constraint.Table(*map(jnp.asarray, built.table))
  state_B = jnp.array([built.start(0, []), *[run(built.table, built.start(1, []), [1])] * 2, built.start(2, []), constraint.ENDED])
  past = history.History(drawn_B=jnp.zeros(5, jnp.int32), state_B=state_B)
  logits_BV = jnp.broadcast_to(jnp.arange(8.0), (5, 8))

  def kept(remaining_B, past):
    out_BV = np.asarray(constraint.allow(logits_BV, past, table, jnp.array(remaining_B)))
    assert ((out_BV == np.asarray(logits_BV)) | (out_BV == -np.inf)).all()
    return [np.flatnonzero(row > -np.inf).tolist() for row in out_BV]

  assert kept([9, 9, 1, 9, 9], past) == [[0, 1, 2, 3, 4], [2], [2], [2, 4], [4]]
  past = past._replace(state_B=constraint.advance(past, table, jnp.array([3, 2, 2, 4, 4])))
  # 'ab' may end, or go on where there is time for two more.
  assert kept([8, 2, 1, 8, 8], past) == [[0, 1, 2, 3, 4], [1, 4], [4], [4], [4]]
  stuck_B = constraint.advance(past, table, jnp.array([4, 0, 7, 1, 1]))
  assert stuck_B.tolist() == past.state_B.tolist()


def test_wanted():
  assert not constraint.wanted(params.SamplingParams())
  assert constraint.wanted(params.SamplingParams(regex='a'))
  assert constraint.wanted(params.SamplingParams(choices=('a',)))


def test_a_constraint_is_compiled_once_for_any_number_of_rows():
  tokenizer = char.CharTokenizer.train(base.TokenizerConfig(), ['ab'])
  batch._compile_constraints.cache_clear()
  tables = []
  for rows in (1, 2, 5):
    settings = [params.SamplingParams(regex='a+')] * rows + [params.SamplingParams()] * (rows - 1)
    table, states = batch._constraints(tokenizer, [[0]] * (2 * rows - 1), settings, 3)
    assert states == [states[0]] * rows + [constraint.FREE] * (rows - 1)
    tables.append(table)
  assert tables[0] is tables[1] is tables[2]


def test_banned_tokens_spell_nothing():
  tokenizer = char.CharTokenizer.train(base.TokenizerConfig(), ['abcd'])
  a, b = tokenizer.encode('ab').tolist()
  free, held = (constraint.compile_constraints(tokenizer, [constraint.Wanted('[ab]c|d', (), ids)], 5) for ids in ((), (a,)))
  assert allowed(free, free.start(0, [0])) == {a, b, tokenizer.encode('d')[0]}
  assert allowed(held, held.start(0, [0])) == {b, tokenizer.encode('d')[0]}
  with pytest.raises(errors.UserError, match='matches no text that this vocabulary can spell'):
    constraint.compile_constraints(tokenizer, [constraint.Wanted('a[bc]', (), (a,))], 5)


def allowed(built, state):
  next_C = np.asarray(built.table.next_SC)[state]
  return {token for token, column in enumerate(built.table.column_V) if next_C[column] >= 0}
