"""tools.sweep_sampling: a grid in one compile, set beside the text of a tiny run."""

import builtins
import json
import math

import jax
import numpy as np
import pytest

from textgen_jax import workdir
from textgen_jax.data import tokens
from textgen_jax.sampling import decode, generate, params
from textgen_jax.statistics import loops, words
from textgen_jax.text import char
from textgen_jax.tools import sweep_sampling

SMALL = ['--num_samples=6', '--max_new_tokens=40', '--prompt=', '--prompt=the king']


def run(*arguments):
  return sweep_sampling.main(['sweep_sampling', *arguments])


@pytest.fixture(scope='module')
def swept(trained, tmp_path_factory):
  """What a small run wrote, and how many loops it compiled."""
  output = tmp_path_factory.mktemp('sweep') / 'new' / 'folder'
  before = decode.decode._cache_size()
  grid = ['--temperature=0', '--temperature=0.5', '--temperature=1', '--temperature=2', '--temperature=1', '--top_p=0.5', '--top_p=1']
  assert run(f'--workdir={trained}', f'--output={output}', '--checkpoint=latest', *SMALL, *grid) == 0
  return output, decode.decode._cache_size() - before


def rows_of(output):
  return {row['name']: row for row in json.loads((output / 'sweep.json').read_text())['rows']}


def test_all_settings_are_drawn_in_one_compile(swept, trained, tmp_path):
  output, compiled = swept
  assert compiled == 1
  assert list(rows_of(output)) == ['T=0', 'T=0.5', 'T=1', 'T=2', 'top-p=0.5', 'train', 'val']  # top-p=1 and the second 1 are T=1
  others = ['--temperature=0', '--temperature=0.1', '--temperature=0.7', '--temperature=1.3', '--top_p=0.9']
  before = decode.decode._cache_size()
  assert run(f'--workdir={trained}', f'--output={tmp_path}', '--seed=5', *SMALL, *others) == 0
  assert decode.decode._cache_size() == before


def test_each_row_is_what_its_settings_draw_after_each_prompt(swept, trained):
  model, rows = workdir.load(trained, 'latest'), rows_of(swept[0])
  for name, settings in (('T=0', {'temperature': 0.0}), ('top-p=0.5', {'top_p': 0.5, 'num_samples': 6})):
    wanted = params.SamplingParams(max_new_tokens=40, stop_at_end=False, **settings)
    alone = generate.generate(model.model, model.params, model.tokenizer, ['', 'the king'], wanted)
    assert [sample['text'] for sample in rows[name]['samples']] == [one.text for one in alone]
  # A document's end must not shorten a text, or texts would not be of one length.
  assert {row['sampling']['stop_at_end'] for row in rows.values() if row['sampling']} == {False}


def test_laws_of_temperature(swept):
  rows = rows_of(swept[0])
  means = {name: {key: one and one['mean'] for key, one in row['statistics'].items()} for name, row in rows.items()}
  assert [len(row['samples']) for row in rows.values()][:5] == [2, 12, 12, 12, 12]  # greedily one a prompt
  assert (means['T=0']['drawn_entropy'], means['val']['drawn_entropy']) == (0, None)
  # At temperature 1 the model's own distribution is drawn from, so what is drawn surprises it by its entropy, on average.
  assert means['T=1']['drawn_entropy'] == pytest.approx(-means['T=1']['log_prob'])
  apart = np.array([sample['entropy'] + sample['log_prob'] for sample in rows['T=1']['samples']])
  assert abs(apart.mean()) < 5 * apart.std(ddof=1) / math.sqrt(len(apart))
  for key, sign in (('drawn_entropy', 1), ('log_prob', -1)):
    values = [sign * means[name][key] for name in ('T=0', 'T=0.5', 'T=1', 'T=2')]
    assert values == sorted(set(values))
  assert means['top-p=0.5']['log_prob'] > means['T=1']['log_prob']


def test_rows_tell_of_their_samples(swept, text_file):
  content = json.loads((swept[0] / 'sweep.json').read_text())
  assert (content['step'], content['prompts'], content['seed']) == (6, ['', 'the king'], 0)
  known = set(words.split(text_file.read_text()))
  for row in content['rows']:
    for sample in row['samples']:
      assert sample['loop'] == ((found := loops.tail(sample['text'])) and found._asdict())
      assert row['sampling'] is None or len(sample['text']) <= 40
    told, texts = row['statistics'], [words.split(sample['text']) for sample in row['samples']]
    assert told['loops']['mean'] == sum(sample['loop'] is not None for sample in row['samples']) / len(texts)
    if (repetition := words.repetition(texts)) is not None:
      assert told['repeated_4_grams']['mean'] == pytest.approx(repetition)
    long = [text[: content['compared_words']] for text in texts if len(text) >= content['compared_words']]
    if long:
      assert told['distinct_2']['mean'] == pytest.approx(sum(words.distinct_n([text], 2) for text in long) / len(long))
      assert told['distinct_2']['samples'] == len(long)
    shares = [sum(word not in known for word in text) / len(text) for text in texts if text]
    assert told['new_words']['mean'] == pytest.approx(sum(shares) / len(shares), abs=0.02)  # val's words are known here too
    entropies = [sample['entropy'] for sample in row['samples']]
    assert told['entropy']['mean'] == pytest.approx(np.mean(entropies))
    if len(entropies) > 1:
      assert told['entropy']['stderr'] == pytest.approx(np.std(entropies, ddof=1) / math.sqrt(len(entropies)))


def test_what_people_wrote_is_cut_evenly_and_scored_by_the_model(trained, text_file):
  model = workdir.load(trained, 'latest')
  text = text_file.read_text()
  ids = np.array([model.tokenizer.special_ids['end_of_text'], *model.tokenizer.encode(text)])
  excerpts = sweep_sampling.read_excerpts(model, ids, 8)
  assert len(excerpts) == sweep_sampling.EXCERPTS
  apart = (len(ids) - 16) // sweep_sampling.EXCERPTS
  assert [one.text for one in excerpts] == [text[15 + i * apart : 23 + i * apart] for i in range(len(excerpts))]
  # By hand: the first excerpt's first token is the last that is read with all of row 0, the others are the last 7 of row 1.
  start = 16 + apart  # of the second excerpt
  log_probs, entropies = [], []
  for low, wanted in ((start - 16, [start]), (start - 8, range(start + 1, start + 8))):
    row = ids[low : low + 16]
    hidden, _ = model.model.apply({'params': model.params}, row[None])
    logits = np.asarray(model.model.apply({'params': model.params}, hidden, method='unembed')[0], np.float64)
    all_log_probs = logits - np.asarray(jax.nn.logsumexp(logits, axis=-1))[:, None]
    for place in wanted:
      line = all_log_probs[place - 1 - low]
      log_probs.append(line[ids[place]])
      entropies.append(-(np.exp(line) * line).sum())
  assert excerpts[1].log_prob == pytest.approx(np.mean(log_probs), rel=1e-5)
  assert excerpts[1].entropy == pytest.approx(np.mean(entropies), rel=1e-5)


def test_excerpts_of_short_texts_do_not_overlap(trained):
  model = workdir.load(trained, 'latest')
  ids = np.concatenate([[model.tokenizer.special_ids['end_of_text']], np.tile(model.tokenizer.encode('the fool '), 10)])  # 91
  assert [len(sweep_sampling.read_excerpts(model, ids, length)) for length in (20, 40, 75, 90, 91)] == [3, 1, 1, 1, 0]
  assert sweep_sampling.read_excerpts(model, ids, 90)[0].text == 'the fool ' * 10


def test_words_of_documents_do_not_run_together():
  tokenizer = char.CharTokenizer(' abcd', '')
  end = tokenizer.special_ids['end_of_text']
  ids = np.array([end, *tokenizer.encode('ab c'), end, *tokenizer.encode('d'), end])
  documents = np.array([(0, 5, 4, 4, 2, 0, 0), (5, 2, 1, 1, 1, 0, 0)], tokens.DOCUMENT)
  assert sweep_sampling.read_words(tokenizer, tokens.Split(ids, documents, ())) == {'ab', 'c', 'd'}


def test_table_text_and_picture(swept, trained, tmp_path, capsys):
  output = swept[0]
  assert {path.name for path in output.iterdir()} == {'sweep.json', 'sweep.md', 'sweep.png'}
  assert (output / 'sweep.png').read_bytes().startswith(b'\x89PNG')
  text, rows = (output / 'sweep.md').read_text(), rows_of(output)
  entropy = rows['T=1']['statistics']['entropy']
  assert f'| T=1 | 12 | {entropy["mean"]:.3f} ± {entropy["stderr"]:.3f} |' in text
  assert all(f'\n## {name}\n' in text for name in rows)
  # Where val is too short there is no row for it; and one sample has no standard error.
  flags = ['--prompt=see', '--num_samples=1', '--max_new_tokens=700', '--temperature=0', '--top_p=1', '--top_k=3', '--min_p=0.1']
  capsys.readouterr()
  assert run(f'--workdir={trained}', f'--output={tmp_path}', *flags) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines[1:]] == ['T=0', 'top-p=1', 'top-k=3', 'min-p=0.1', 'train']
  assert {row['statistics']['entropy']['stderr'] for row in list(rows_of(tmp_path).values())[:4]} == {None}


def test_without_matplotlib_the_rest_is_written(trained, tmp_path, capsys, monkeypatch):
  real = builtins.__import__

  def without(name, *rest):
    if name.startswith('matplotlib'):
      raise ImportError(name)
    return real(name, *rest)

  monkeypatch.setattr(builtins, '__import__', without)
  assert run(f'--workdir={trained}', f'--output={tmp_path}/out', '--num_samples=1', '--max_new_tokens=5', '--temperature=1') == 0
  assert "no sweep.png without matplotlib: pip install 'textgen_jax[inspect]'" in capsys.readouterr().err
  assert {path.name for path in (tmp_path / 'out').iterdir()} == {'sweep.json', 'sweep.md'}


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--temperature=nan'], 'temperature=nan is not a finite number of at least 0'),
    (['--temperature=1', '--temperature=-0.5'], 'temperature=-0.5 is not a finite number of at least 0'),
    (['--temperature=hot'], 'temperature'),
    (['--top_p=2'], 'top_p=2.0 is not in (0, 1]'),
    (['--top_k=-1'], 'top_k=-1 is not at least 0'),
    (['--min_p=1.5'], 'min_p=1.5 is not in [0, 1]'),
    (['--num_samples=0'], 'num_samples=0 is not at least 1'),
    (['--max_new_tokens=0'], 'max_new_tokens=0 is not at least 1'),
    (['--max_new_tokens=100000'], 'max_new_tokens=100000 is above the'),
    (['--seed=-1'], 'seed=-1 is not in [0, 2**32)'),
    (['--temprature=1'], 'there is no flag --temprature; did you mean --temperature?'),
    (['--output=FILE'], 'is a file: name a directory'),
    (['--prompt=Zebra'], "character 'Z' at offset 0 isn't among"),
    (['--workdir='], '--workdir is missing'),
    (['--workdir=/nowhere'], 'no checkpoint was ever written there'),
  ],
)
def test_refusals(trained, text_file, capsys, flags, message):
  capsys.readouterr()
  assert run(f'--workdir={trained}', *(flag.replace('FILE', str(text_file)) for flag in flags)) == 2
  out, err = capsys.readouterr()
  assert message in err
  assert (out, len(err.splitlines())) == ('', 1)


def test_help(capsys):
  assert run('--help') == 0
  assert '--top_p=' in capsys.readouterr().out
