import re

import pytest

from textgen_jax.data import plays

MARKDOWN = """# The Play

## ACT I

### SCENE I. A wood. ADA
lying asleep.

_Enter ADA and two
others, by torchlight_

**ADA**
First line;
_\\[Aside]_
second \\--line.

_Burthen _\\[dispersedly, within_

Third line.

### SCENE II. The

same.

**ROSE: & BOB & & C**
__\\[Within]_
Go to , & c.

**BOB**
[To ADA]_
Nay—I will not.
BISHOP

**OF YORK**
*Sound a horn.*
*[Kneeling.]*
Amen.
SONG.
Varro's Servant I fear it.

**ADA**
_Exit_

_Exeunt_
"""

SCENES = {
  '1.1': ['ADA:\nFirst line;\nsecond --line.\nThird line.\n\n'],
  '1.2': [
    'ROSE & BOB &c:\nGo to, &c.\n\n',
    'BOB:\nNay--I will not.\n\n',
    'BISHOP OF YORK:\nAmen.\n\n',
    "Varro's Servant:\nI fear it.\n\n",
  ],
}


def test_play_reads_as_scenes_of_names_and_lines():
  with_line_breaks = re.sub(r'(?<=.)\n', '  \n', MARKDOWN)  # as the wheel has them: an editor would strip them here
  assert plays.scenes(with_line_breaks) == plays.scenes(MARKDOWN) == SCENES


@pytest.mark.parametrize(
  ('play', 'names'),
  [
    ('# A Play|## PROLOGUE|### SCENE I. A heath.|!|### SCENE II|!|## ACT I|### SCENE I.|!', ['prologue.1', 'prologue.2', '1.1']),
    ('## PROLOGUE. Before the castle|!|## ACT I|!', ['prologue', '1']),
    ('## ACT I|### Prologue|!|## SCENE I. A desert.|!|#### ACT IV|### PROLOGUE|!', ['1.prologue', '1.1', '4.prologue']),
    ('## ACT III|### SCENE XIV.|!|# INTERMISSION|### SCENE XV.|!', ['3.14', '3.15']),
    ('## ACT V|### SCENE IV. A field.|!|### SCENE IV. A hill.|!|# EPILOGUE|!', ['5.4', '5.4b', 'epilogue']),
    ('## ACT I|SCENE II: Belmont.|!|SCENE VI:|!', ['1.2', '1.6']),
    ('!|# Title|!', ['start', 'title']),
    ('## ACT I|### SCENE I.|**ADA**\n_Exit_|### SCENE II.|!', ['1.2']),  # a scene without a speech
  ],
)
def test_scenes_are_named_by_act_and_number(play, names):
  markdown = play.replace('|', '\n\n').replace('!', '**ADA**\nSo.')
  assert list(plays.scenes(markdown).items()) == [(name, ['ADA:\nSo.\n\n']) for name in names]
