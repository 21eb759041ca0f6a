import pytest

from textgen_jax.data import tunes

FILE = """% A collection
X: 7
T: FOX CHASE, THE -- JIG.   % a note
T: The Other Title
 a line of a field gone wrong
Z: someone
M:6/8
R: jig
Q: 1/8=120
K: G
%%a directive
G:|"Am"[K:D]abc \\
  d2e:|  % twice

P:B
K: D
L:1/16
w: words
|: [M:2/4]g\\%a :|
X:8
T:Silent
M:4/4
K:C
K:D
% nothing
X:9
T:Two
M:2/4
L:1/8
K:C
c
"""


def test_tunes_have_one_form():
  assert [tune.text for tune in tunes.tunes(FILE)] == [
    'X:1\nT:FOX CHASE, THE -- JIG.\nR:jig\nM:6/8\nL:1/8\nK:G\nG:|"Am"[K:D]abc \\\nd2e:|\nK:D\nL:1/16\n|: [M:2/4]g\\%a :|\n',
    'X:1\nT:Two\nM:2/4\nL:1/8\nK:C\nc\n',
  ]


def test_one_form_is_its_own():
  texts = [tune.text for tune in tunes.tunes(FILE)]
  assert [tune.text for tune in tunes.tunes(''.join(texts))] == texts


@pytest.mark.parametrize(('meter', 'length'), [('2/4', '1/16'), ('5/8', '1/16'), ('3/4', '1/8'), ('6/8', '1/8'), ('C|', '1/8')])
def test_missing_note_length_follows_the_meter(meter, length):  # the ABC standard 2.1, section 3.1.7
  (tune,) = tunes.tunes(f'X:1\nT:a\nM:{meter}\nK:C\nc\n')
  assert f'\nL:{length}\n' in tune.text


@pytest.mark.parametrize(
  'titles',
  [
    ['Fox Chase, The', 'THE FOX CHASE -- REEL.', "The Fox's Chase", 'fox  chase (hornpipe)'],
    ["O'Carolan's Devotion", 'OCarolans Devotion.'],
  ],
)
def test_versions_of_a_title_share_a_key(titles):
  assert len({tunes.title_key(title) for title in titles}) == 1
  assert tunes.title_key(titles[0])


def test_other_titles_do_not():
  assert len({tunes.title_key(title) for title in ['Fox Chase', 'Fox Hunt', 'Reel', 'Jig', 'Mass', 'Mast']}) == 6


def test_notes_are_the_same_whatever_stands_around_them():
  texts = ['X:1\nT:a\nM:2/4\nK:G\nabc [ce]\n', 'X:2\nT:b\nM:C\nK:D\nL:1/4\na2|b>^c ([c/e]):|\n']
  first, second = (next(tunes.tunes(text)) for text in texts)
  assert first.notes == second.notes == 'abcce'
