"""A user's mistake ends in one line that names it, exit code 2, and nothing written."""

import os
import pathlib
import subprocess
import sys

import conftest
import pytest

import sample
import train

ROOT = pathlib.Path(__file__).parent.parent


def snapshot(directory):
  """Every file's content below `directory`; {} where there is none."""
  return {path: path.read_bytes() for path in sorted(directory.rglob('*')) if path.is_file()}


def check_line(stderr, *parts):
  lines = stderr.strip().splitlines()
  assert len(lines) == 1, stderr
  assert lines[0].startswith('error: ')
  assert len(lines[0]) <= 400
  for part in parts:
    assert part in lines[0], lines[0]


def refuse_training(capsys, tmp_path, text_file, flags, *parts):
  workdir = tmp_path / 'run'
  capsys.readouterr()
  assert train.main(conftest.train_argv(workdir, text_file, *flags)) == 2
  out, err = capsys.readouterr()
  assert out == ''
  check_line(err, *parts)
  assert not workdir.exists()


@pytest.mark.parametrize(
  ('flag', 'parts'),
  [
    ('--config.model.dmi=8', ['model.dmi', 'did you mean model.dim?']),
    ('--config.modle.dim=8', ['modle', 'did you mean model?']),
    ('--config.optimizer.peak_rl=1', ['did you mean optimizer.peak_lr?']),
    ('--config.model=8', ['model is a group of fields', 'model.dim']),
    ('--config.sharding.rules={}', ['sharding.rules', 'config file']),
    ('--config.seed.x=8', ['seed', 'no fields']),
    ('--config.training.num_steps=many', ['training.num_steps', 'many']),
    ('--config.model.dropout=high', ['model.dropout', 'high']),
    ('--config.model.bias=perhaps', ['model.bias', 'perhaps']),
    ('--workdri=x', ['--workdri', 'did you mean --workdir?']),
    ('stray', ["'stray' is not a flag"]),
    ('--config.model.num_heads=3', ["model.dim=16 isn't divisible by model.num_heads=3"]),
    ('--config.model.num_kv_heads=3', ['model.num_kv_heads=3']),
    ('--config.model.num_layers=0', ['model.num_layers=0', 'below 1']),
    ('--config.model.num_layers=1001', ['model.num_layers=1001', 'above 1000']),
    ('--config.model.dim=99999999999', ['model.dim=99999999999', '2**31']),
    ('--config.model.position=rotray', ['rotray', "did you mean 'rotary'?"]),
    ('--config.model.dropout=1', ['model.dropout=1.0', '[0, 1)']),
    ('--config.model.dropout=nan', ['model.dropout=nan', '[0, 1)']),
    ('--config.optimizer.peak_lr=-1', ['optimizer.peak_lr=-1.0', 'at least 0']),
    ('--config.optimizer.peak_lr=nan', ['optimizer.peak_lr=nan', 'finite']),
    ('--config.optimizer.weight_decay=inf', ['optimizer.weight_decay=inf', 'finite']),
    ('--config.optimizer.b2=1', ['optimizer.b2=1.0', '[0, 1)']),
    ('--config.optimizer.schedule=cosin', ['cosin', "did you mean 'cosine'?"]),
    ('--config.optimizer.warmup_steps=-6', ['optimizer.warmup_steps=-6', 'at least 0']),
    ('--config.training.batch_size=0', ['training.batch_size=0', 'below 1']),
    ('--config.training.num_steps=-5', ['training.num_steps=-5', 'below 1']),
    ('--config.training.accumulation_steps=3', ['training.batch_size=4', 'training.accumulation_steps=3']),
    ('--config.training.windows=contiguous', ['training.windows', 'Transformer']),
    ('--config.training.profile_steps=9', ['training.profile_steps', "'9'", 'FIRST:LAST']),
    ('--config.training.sample_temperatures=-0.5', ['training.sample_temperatures', '-0.5']),
    ('--config.training.sample_prompt=Zoo', ["'Z'"]),
    ('--config.training.sequence_length=6000', ['training.sequence_length=6000', 'tokens']),
    ('--config.sharding.data=7', ['sharding.data=7', 'devices']),
    ('--config.data.val_fraction=1.5', ['data.val_fraction=1.5']),
    ('--config.data.val_fraction=nan', ['data.val_fraction=nan']),
    ('--config.tokenizer.kind=chra', ['chra', 'char']),
    ('--config.init_from=/nowhere', ['/nowhere', 'no checkpoint was ever written']),
    ('--config.seed=-1', ['seed=-1']),
  ],
)
def test_wrong_value(capsys, tmp_path, text_file, flag, parts):
  refuse_training(capsys, tmp_path, text_file, [flag], *parts)


def test_wrong_corpus(capsys, tmp_path):
  flags = ['train.py', f'--config={conftest.CONFIGS}/debug.py', f'--workdir={tmp_path}/run', '--config.data.corpus=shakespear']
  assert train.main(flags) == 2
  check_line(capsys.readouterr().err, 'shakespear', "shakespeare")
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('content', 'parts'),
  [
    (b'', ['less than 2 characters']),
    (b'too short', ['tokens', '17']),
    (b'fine until here \xff and on' * 20, ["UTF-8", '16']),
  ],
)
def test_wrong_text(capsys, tmp_path, content, parts):
  path = tmp_path / 'text.txt'
  path.write_bytes(content)
  refuse_training(capsys, tmp_path, path, [], *parts)


def test_text_file_missing(capsys, tmp_path):
  refuse_training(capsys, tmp_path, tmp_path / 'nowhere.txt', [], 'nowhere.txt')


def test_character_that_only_val_has(capsys, tmp_path):
  path = tmp_path / 'text.txt'
  path.write_text('abc ' * 500 + 'é' * 3, encoding='utf-8')
  refuse_training(capsys, tmp_path, path, [], "'é'", 'val', 'tokenizer.unknown_symbol')


@pytest.mark.parametrize('config', ['configs/debgu.py', 'configs', ''])
def test_config_file_missing(capsys, tmp_path, monkeypatch, config):
  monkeypatch.chdir(ROOT)
  assert train.main(['train.py', f'--config={config}', f'--workdir={tmp_path}/run']) == 2
  check_line(capsys.readouterr().err, '--config')
  assert not (tmp_path / 'run').exists()


def test_config_file_without_get_config(capsys, tmp_path):
  for content in ('x = 1', 'def get_config():\n  return 3', 'def get_config(:'):
    (tmp_path / 'c.py').write_text(content)
    assert train.main(['train.py', f'--config={tmp_path}/c.py', f'--workdir={tmp_path}/run']) == 2
    check_line(capsys.readouterr().err, 'c.py')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('flag', 'part'),
  [
    ('--config.model.dim=32', 'model.dim: 16 -> 32'),
    ('--config.optimizer.peak_lr=0.5', 'optimizer.peak_lr: 0.001 -> 0.5'),
    ('--config.seed=5', 'seed: 0 -> 5'),
    ('--config.training.batch_size=8', 'training.batch_size: 4 -> 8'),
  ],
)
def test_workdir_of_other_settings(capsys, trained, text_file, flag, part):
  before = snapshot(trained)
  capsys.readouterr()
  assert train.main(conftest.train_argv(trained, text_file, flag)) == 2
  check_line(capsys.readouterr().err, str(trained), part)
  assert snapshot(trained) == before


def test_workdir_of_other_text(capsys, tmp_path, trained, text_file):
  other = tmp_path / 'other.txt'
  other.write_text(text_file.read_text().replace('king', 'gnik'))
  before = snapshot(trained)
  capsys.readouterr()
  assert train.main(conftest.train_argv(trained, other)) == 2
  check_line(capsys.readouterr().err, str(trained), 'data')
  assert snapshot(trained) == before


@pytest.mark.parametrize(
  ('flags', 'parts'),
  [
    (['--prompt=the Zoo'], ["'Z'", '4']),
    (['--temperature=-1'], ['temperature=-1.0', 'at least 0']),
    (['--temperature=nan'], ['temperature=nan', 'finite']),
    (['--temperature=hot'], ['temperature', 'hot']),
    (['--top_p=0'], ['top_p=0.0', '(0, 1]']),
    (['--top_p=1.1'], ['top_p=1.1', '(0, 1]']),
    (['--top_p=nan'], ['top_p=nan', '(0, 1]']),
    (['--top_k=-2'], ['top_k=-2', 'at least 0']),
    (['--top_k=99999999999999999999'], ['top_k=99999999999999999999', '2**31']),
    (['--output=/tmp'], ['/tmp', 'directory']),
    (['--max_new_tokens=-1'], ['max_new_tokens=-1']),
    (['--num_samples=0'], ['num_samples=0']),
    (['--stop='], ['stop']),
    (['--checkpoint=bset'], ['bset', 'best, latest, ']),
    (['--checkpoint=999'], ['999', '6']),
    (['--format=xml'], ['xml', 'jsonl']),
    (['--stream', '--num_samples=2'], ['--stream']),
    (['--temprature=1'], ['--temprature', 'did you mean --temperature?']),
    (['--prompts_file=/nowhere.txt'], ['/nowhere.txt']),
    (['--prompt=a', '--prompts_file=/nowhere.txt'], ['--prompt', '--prompts_file']),
    (['--output=/nowhere/out.txt'], ['/nowhere/out.txt']),
  ],
)
def test_wrong_sample(capsys, trained, flags, parts):
  before = snapshot(trained)
  capsys.readouterr()
  assert sample.main(['sample.py', f'--workdir={trained}', *flags]) == 2
  out, err = capsys.readouterr()
  assert out == ''
  check_line(err, *parts)
  assert snapshot(trained) == before


@pytest.mark.parametrize('content', ['', '{"prompt": 3}\n', '{"promt": "a"}\n', 'words\n', '[]\n'])
def test_wrong_prompts_file(capsys, tmp_path, trained, content):
  path = tmp_path / 'prompts.jsonl'
  path.write_text(content)
  capsys.readouterr()
  assert sample.main(['sample.py', f'--workdir={trained}', f'--prompts_file={path}']) == 2
  check_line(capsys.readouterr().err, 'prompts.jsonl')


def test_workdir_without_checkpoint(capsys, tmp_path):
  for workdir in (tmp_path, tmp_path / 'nowhere'):
    assert sample.main(['sample.py', f'--workdir={workdir}']) == 2
    check_line(capsys.readouterr().err, str(workdir), 'no checkpoint was ever written')
  assert list(tmp_path.iterdir()) == []


def command(*argv, **env):
  return subprocess.run([sys.executable, *argv], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)


def test_commands_themselves(tmp_path, text_file, trained):
  workdir = tmp_path / 'run'
  typo = command(*conftest.train_argv(workdir, text_file, '--config.training.num_stpes=3'))
  assert (typo.returncode, typo.stdout) == (2, '')
  check_line(typo.stderr, 'training.num_stpes', 'did you mean training.num_steps?')
  flags = '--xla_force_host_platform_device_count=3'
  devices = command(*conftest.train_argv(workdir, text_file), XLA_FLAGS=flags)
  assert devices.returncode == 2
  check_line(devices.stderr, 'training.batch_size=4', '3 devices')
  assert not workdir.exists()
  hot = command('sample.py', f'--workdir={trained}', '--temperature=-1')
  assert (hot.returncode, hot.stdout) == (2, '')
  check_line(hot.stderr, 'temperature=-1.0')
