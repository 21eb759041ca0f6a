"""train.py, sample.py and tools.evaluate as scripts use them."""

import json
import math
import os
import pathlib
import subprocess
import sys

import conftest
import pytest

import sample
import train
from textgen_jax.tools import evaluate

ROOT = pathlib.Path(__file__).parent.parent


def run_sample(capsys, workdir, *flags):
  capsys.readouterr()
  assert sample.main(['sample.py', f'--workdir={workdir}', *flags]) == 0
  return capsys.readouterr().out


def test_help_lists_the_fields_and_exits_0(capsys):
  assert train.main(['train.py', '--help', f'--config={conftest.CONFIGS}/debug.py']) == 0
  out = capsys.readouterr().out
  assert '--config.model.dim=32 (int)' in out
  assert "--config.data.corpus='python_stdlib' (str)" in out
  assert '--config.optimizer.clip_norm=1.0 (float): global norm' in out
  for main in (train.main, sample.main, evaluate.main):
    assert main(['x.py', '--help']) == 0
    assert '--' in capsys.readouterr().out


def test_workdir_holds_what_design_names(trained):
  names = {path.name for path in trained.iterdir()}
  assert {'config.json', 'tokenizer', 'checkpoints', 'metrics.jsonl'} <= names
  assert any(name.startswith('events.out.tfevents') for name in names)
  records = [json.loads(line) for line in (trained / 'metrics.jsonl').read_text().splitlines()]
  train_keys = {'step', 'train/loss', 'train/grad_norm', 'train/learning_rate', 'train/tokens_per_s'}
  assert any(train_keys <= set(record) for record in records)
  assert any({'step', 'val/loss', 'val/bits_per_byte', 'val/perplexity'} <= set(record) for record in records)


def test_a_finished_run_says_so_and_changes_nothing(capsys, trained, text_file):
  before = {path: path.read_bytes() for path in (trained / 'checkpoints').rglob('*') if path.is_file()}
  assert train.main(conftest.train_argv(trained, text_file)) == 0
  assert 'has trained 6 steps already' in capsys.readouterr().err
  assert before == {path: path.read_bytes() for path in (trained / 'checkpoints').rglob('*') if path.is_file()}


def test_text_is_the_prompt_and_what_follows(capsys, trained):
  flags = ['--prompt=the king', '--prompt=a', '--num_samples=2', '--max_new_tokens=20', '--top_k=5']  # the end isn't among those
  out = run_sample(capsys, trained, *flags)
  texts = out.removesuffix('\n').split('\n---\n')
  assert len(texts) == 4
  for text, prompt in zip(texts, ['the king'] * 2 + ['a'] * 2, strict=True):
    assert text.startswith(prompt)
    assert len(text) == len(prompt) + 20
  assert texts[0] != texts[1]
  assert out == run_sample(capsys, trained, *flags)


def test_jsonl_rows(capsys, trained, tmp_path):
  (tmp_path / 'prompts.jsonl').write_text('{"prompt": "the"}\n{"prompt": ""}\n')
  flags = [f'--prompts_file={tmp_path}/prompts.jsonl', '--max_new_tokens=12', '--seed=7', '--format=jsonl']
  rows = [json.loads(line) for line in run_sample(capsys, trained, *flags).splitlines()]
  assert [set(row) for row in rows] == [{'prompt', 'text', 'tokens', 'sample_index', 'seed', 'finish_reason'}] * 2
  assert [(row['prompt'], row['seed'], row['finish_reason']) for row in rows] == [('the', 7, 'length'), ('', 7, 'length')]
  assert all(len(row['tokens']) == len(row['text']) == 12 for row in rows)
  run_sample(capsys, trained, *flags, f'--output={tmp_path}/out.jsonl')
  assert [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()] == rows


def test_lines_of_a_text_file_are_prompts(capsys, trained, tmp_path):
  (tmp_path / 'prompts.txt').write_text('the king\nsea\n')
  out = run_sample(capsys, trained, f'--prompts_file={tmp_path}/prompts.txt', '--max_new_tokens=0')
  assert out == 'the king\n---\nsea\n'


def test_stream_writes_what_text_writes(capsys, trained):
  flags = ['--prompt=the', '--max_new_tokens=70', '--temperature=0.7']
  assert run_sample(capsys, trained, *flags, '--stream') == run_sample(capsys, trained, *flags)


def test_checkpoints_by_name_and_step(capsys, trained):
  latest = run_sample(capsys, trained, '--checkpoint=latest', '--max_new_tokens=10')
  assert latest == run_sample(capsys, trained, '--checkpoint=6', '--max_new_tokens=10')


def test_evaluate_writes_one_json_line_that_agrees_with_training(capsys, trained, text_file, tmp_path):
  capsys.readouterr()
  flags = [f'--workdir={trained}', '--checkpoint=latest', '--stride=16']
  assert evaluate.main(['evaluate', *flags]) == 0
  row = json.loads(capsys.readouterr().out)
  final = json.loads((trained / 'metrics.jsonl').read_text().splitlines()[-1])
  assert row['loss_nats'] == pytest.approx(final['val/loss'], rel=1e-6)
  assert row['perplexity'] == pytest.approx(math.exp(row['loss_nats']))
  assert row['bits_per_byte'] == pytest.approx(row['loss_nats'] / math.log(2) * row['tokens'] / row['bytes'])
  assert row['bits_per_byte'] == pytest.approx(final['val/bits_per_byte'], rel=1e-6)
  assert row['bits_per_character'] == pytest.approx(row['bits_per_byte'])
  # The val split is the last tenth of the file: scored as a file of its own it is the same text.
  text = text_file.read_text()
  tail = text[len(text) - row['bytes'] :]
  assert (row['tokens'], row['characters'], row['words'], row['unknowns']) == (len(tail) + 1, len(tail), len(tail.split()), 0)
  assert (row['text'], row['step'], row['stride'], row['documents']) == ('val', 6, 16, 1)
  (tmp_path / 'tail.txt').write_text(tail)
  assert evaluate.main(['evaluate', *flags, f'--data={tmp_path}/tail.txt']) == 0
  other = json.loads(capsys.readouterr().out)
  assert other['loss_nats'] == pytest.approx(row['loss_nats'], rel=1e-6)
  same = ('tokens', 'bytes', 'characters', 'words', 'documents')
  assert {name: other[name] for name in same} == {name: row[name] for name in same}
  # More context lowers the loss; by default a row begins in the middle of the one before it.
  assert evaluate.main(['evaluate', *flags[:2]]) == 0
  assert json.loads(capsys.readouterr().out)['stride'] == 8


def test_evaluate_writes_a_line_for_each_document(capsys, trained, tmp_path):
  texts = ['the king went home.', 'a ship of war', 'see the fool']
  path = tmp_path / 'texts.jsonl'
  path.write_text(''.join(json.dumps({'body': text}) + '\n' for text in texts))
  capsys.readouterr()
  argv = ['evaluate', f'--workdir={trained}', f'--data={path}', '--field=body', '--documents']
  assert evaluate.main(argv) == 0
  *rows, whole = map(json.loads, capsys.readouterr().out.splitlines())
  assert [row['document'] for row in rows] == [f'texts.jsonl:{n}' for n in (1, 2, 3)]
  assert [(row['tokens'], row['bytes']) for row in rows] == [(len(text) + 1, len(text)) for text in texts]
  assert sum(row['tokens'] for row in rows) == whole['tokens']
  assert sum(row['loss_nats'] * row['tokens'] for row in rows) == pytest.approx(whole['loss_nats'] * whole['tokens'])
  assert (whole['documents'], whole['text']) == (3, str(path))
  # The standard error, by hand.
  nll, sizes = [row['loss_nats'] * row['tokens'] for row in rows], [row['tokens'] for row in rows]
  left = [one - size * sum(nll) / sum(sizes) for one, size in zip(nll, sizes, strict=True)]
  assert whole['loss_nats_stderr'] == pytest.approx(math.sqrt(3 / 2 * sum(x * x for x in left)) / sum(sizes))
  assert {row['loss_nats_stderr'] for row in rows} == {None}


@pytest.mark.parametrize('flags', [['--split=tset'], ['--data=/nowhere'], ['--checkpoint=7']])
def test_evaluate_refuses(capsys, trained, flags):
  capsys.readouterr()
  assert evaluate.main(['evaluate', f'--workdir={trained}', *flags]) == 2
  out, err = capsys.readouterr()
  assert (out, len(err.splitlines())) == ('', 1)


def test_a_reader_that_leaves_early_gets_no_traceback(trained):
  command = f'{sys.executable} sample.py --workdir={trained} --max_new_tokens=2000 --stream | head -c 5'
  result = subprocess.run(command, shell=True, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)
  assert len(result.stdout) == 5
  assert 'Traceback' not in result.stderr


@pytest.mark.parametrize('closed', ['>&-', '2>&-'])
def test_a_closed_stream_is_no_error(trained, closed):
  command = f'{sys.executable} sample.py --workdir={trained} --max_new_tokens=5 --prompt=the {closed}'
  result = subprocess.run(command, shell=True, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)
  assert result.returncode == 0
  assert 'Traceback' not in result.stderr
  assert result.stdout.startswith('the') == (closed == '2>&-')
  assert 'tokens' not in result.stdout  # what is told of the work
