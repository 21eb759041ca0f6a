"""tools.inspect_samples: files in, a table and two files out; drawing by a fake."""

import builtins
import json
import random
import types

import pytest

from textgen_jax import workdir
from textgen_jax.tools import evaluate, inspect_samples

COPIED = 'Now is the winter of our discontent made glorious summer by this sun of York'


def prose(seed, count):
  draw = random.Random(seed)
  return ' '.join(draw.choices([f'word{i}' for i in range(200)], k=count))


@pytest.fixture
def files(tmp_path):
  """A training text that holds COPIED at character 13 of its second file, and two samples, of which the second copies it."""
  (tmp_path / 'one.txt').write_text(prose(1, 2000))
  (tmp_path / 'two.txt').write_text('— thirteen — ' + COPIED + '. ' + prose(2, 2000))
  (tmp_path / 'val.txt').write_text(prose(3, 2000))
  rows = [{'prompt': 'x', 'text': prose(4, 200)}, {'prompt': 'x', 'text': prose(5, 100) + '#' + COPIED + '#' + prose(6, 100)}]
  (tmp_path / 'samples.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return tmp_path


def run(*arguments):
  return inspect_samples.main(['inspect_samples', *arguments])


def train_flags(files):
  return [f'--train={files}/one.txt', f'--train={files}/two.txt']


def test_files_against_files(files, capsys):
  output = files / 'new' / 'folder'
  assert run(f'--samples={files}/samples.jsonl', f'--val={files}/val.txt', f'--output={output}', *train_flags(files)) == 0
  out = capsys.readouterr().out
  content = json.loads((output / 'statistics.json').read_text())
  own, train, val = content['columns']
  assert [train['name'], val['name']] == ['train', 'val']
  (copy,) = own['copies']
  at = len(prose(5, 100)) + 1
  expected = {'sample': 1, 'text': COPIED, 'sample_offset': at, 'document': f'{files}/two.txt', 'document_offset': 13, 'occurrences': 1}
  assert copy == expected
  assert f'{len(COPIED)} characters of {files}/samples.jsonl, sample 1 at {at}: {files}/two.txt at 13\n  {COPIED!r}' in out
  assert own['copied_share'] == pytest.approx(len(COPIED) / own['characters'])
  assert len({column['compared_words'] for column in content['columns']}) == 1
  assert (train['novelty'], train['copies'], val['copies']) == (None, None, [])
  # Words are drawn alike for all, so only the copy's length tells the samples from held-out text.
  assert own['novelty'][0] == pytest.approx(2 / own['words'])  # the two marks around the copy
  assert abs(own['distinct_n'][0] - val['distinct_n'][0]) < 0.1
  assert (output / 'statistics.png').read_bytes().startswith(b'\x89PNG')


def test_a_text_is_one_sample_and_val_may_lack(files, capsys):
  (files / 'whole.txt').write_text('\n'.join([prose(7, 100), prose(8, 100)]))
  assert run(f'--samples={files}/whole.txt', f'--samples={files}/samples.jsonl', *train_flags(files)) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[1].split() == ['samples', '1', '2', '2']
  assert lines[0].split()[-1] == 'train'
  assert not list(files.glob('**/statistics.*'))  # nowhere to write to


def test_a_run_is_drawn_from_at_each_temperature(files, capsys, monkeypatch):
  calls = []

  def draw(trained, prompt, each):
    calls.append((trained.experiment.data, prompt, [(one.temperature, one.num_samples, one.seed) for one in each.values()]))
    return {name: [prose(9, 50)] * one.num_samples for name, one in each.items()}

  trained = types.SimpleNamespace(experiment=types.SimpleNamespace(data='the data'))
  monkeypatch.setattr(workdir, 'load', lambda path, checkpoint: trained)
  monkeypatch.setattr(evaluate, 'own_text', lambda trained: None)
  monkeypatch.setattr(inspect_samples, 'draw', draw)
  monkeypatch.setattr(inspect_samples, 'read_splits', lambda config: ([('train', prose('train', 500))], [('val', prose('val', 500))]))
  flags = ['--temperature=0.5', '--temperature=1', '--num_samples=3', '--seed=7', '--prompt=x']
  assert run(f'--workdir={files}', *flags) == 0
  assert calls == [('the data', 'x', [(0.5, 3, 7), (1.0, 3, 7)])]
  assert capsys.readouterr().out.splitlines()[0].split() == ['t=0.5', 't=1', 'train', 'val']
  assert (files / 'statistics' / 'statistics.json').is_file()


def test_excerpts_are_apart_and_of_one_length():
  documents = [('a', 'abcde'), ('b', 'fghi')]  # 'abcde\nfghi'
  assert inspect_samples.excerpts(documents, 2, 3) == ['abc', '\nfg']
  assert inspect_samples.excerpts(documents, 5, 100) == ['ab', 'cd', 'e\n', 'fg', 'hi']


def test_without_matplotlib_the_rest_is_written(files, capsys, monkeypatch):
  real = builtins.__import__

  def without(name, *rest):
    if name.startswith('matplotlib'):
      raise ImportError(name)
    return real(name, *rest)

  monkeypatch.setattr(builtins, '__import__', without)
  assert run(f'--samples={files}/samples.jsonl', f'--output={files}/out', *train_flags(files)) == 0
  assert 'textgen_jax[inspect]' in capsys.readouterr().err
  assert [path.name for path in (files / 'out').iterdir()] == ['statistics.json']


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], '--workdir is missing'),
    (['--samples=samples.jsonl'], '--workdir is missing'),
    (['--samples=samples.jsonl', '--train=none.txt'], "train='none.txt' can't be read: No such file"),
    (['--samples=bad.jsonl', '--train=one.txt'], "samples='bad.jsonl', line 2"),
    (['--samples=samples.jsonl', '--train=blank.txt'], 'train holds no words'),
    (['--samples=samples.jsonl', '--train=latin.txt'], "train='latin.txt' isn't UTF-8 at byte 1"),
    (['--samples=samples.jsonl', '--train=one.txt', '--at_least=0'], 'at_least=0 is not at least 1'),
    (['--samples=samples.jsonl', '--train=one.txt', '--output=one.txt'], "output='one.txt' is a file"),
    (['--samples=val', '--train=one.txt'], "samples='val' is the name of another column"),
    (['--workdir=nowhere', '--temperature=-1'], 'temperature=-1.0 is not a finite number'),
    (['--workdir=nowhere'], 'no checkpoint was ever written'),
  ],
)
def test_refusals(files, capsys, monkeypatch, flags, message):
  monkeypatch.chdir(files)
  (files / 'bad.jsonl').write_text('{"text": "fine"}\n{"txt": "not"}\n')
  (files / 'blank.txt').write_text(' \n')
  (files / 'latin.txt').write_bytes(b'a\xe9b')
  assert run(*flags) == 2
  out, err = capsys.readouterr()
  assert message in err
  assert (out, len(err.splitlines())) == ('', 1)


def test_help(capsys):
  assert run('--help') == 0
  assert '--at_least' in capsys.readouterr().out
