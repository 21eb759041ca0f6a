"""A user's mistake ends in one line that names it, exit code 2, and nothing written."""

import gzip
import os
import pathlib
import shutil
import subprocess
import sys

import conftest
import pytest
import sentencepiece
import zstandard

import sample
import train
from textgen_jax.tools import evaluate

ROOT = pathlib.Path(__file__).parent.parent


def snapshot(directory):
  """Every file's content below `directory`; {} where there is none."""
  return {path: path.read_bytes() for path in sorted(directory.rglob('*')) if path.is_file()}


def check_line(stderr, *parts):
  # What a tokenizer is about to learn is told before it turns out that it can't.
  lines = [line for line in stderr.strip().splitlines() if not line.startswith('sentencepiece: learning ')]
  assert len(lines) == 1, stderr
  assert lines[0].startswith('error: ')
  assert len(lines[0]) <= 300
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
  check_cache()


def check_cache():
  """Nothing half-prepared is left."""
  prepared = pathlib.Path(os.environ['TEXTGEN_JAX_CACHE'], 'prepared')
  assert not list(prepared.glob('*.partial'))
  assert all(path.suffix == '.lock' or (path / 'description.json').is_file() for path in prepared.glob('*'))


@pytest.mark.parametrize(
  ('flag', 'parts'),
  [
    ('--config.model.dmi=8', ['model.dmi', 'did you mean model.dim?']),
    ('--config.modle.dim=8', ['modle', 'did you mean model?']),
    ('--config.optimizer.peak_rl=1', ['did you mean optimizer.peak_lr?']),
    ('--config.model=8', ['model is a group of fields', 'model.dim']),
    ('--config.sharding.rules={}', ['sharding.rules', 'config file']),
    ('--config.seed.x=8', ['seed', 'no fields']),
    ('--config.training.steps_per_dispatch=0', ['training.steps_per_dispatch=0', 'below 1']),
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
    ('--config.model.attention_kernel=cudn', ['cudn', "did you mean 'cudnn'?"]),
    ('--config.model.attention_kernel=cudnn', ["model.attention_kernel='cudnn'", 'NVIDIA GPU', 'cpu']),
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
    ('--config.training.product_dtype=bfloat', ['training.product_dtype', "did you mean 'bfloat16'?"]),
    ('--config.training.windows=contiguous', ['training.windows', 'Transformer']),
    ('--config.training.profile_steps=9', ['training.profile_steps', "'9'", 'FIRST:LAST']),
    ('--config.training.sample_temperatures=-0.5', ['training.sample_temperatures', '-0.5']),
    ('--config.training.sample_prompt=Zoo', ["training.sample_prompt='Zoo'", "'Z'"]),
    ('--config.training.mask_documents=perhaps', ['training.mask_documents', 'perhaps']),
    ('--config.training.eval_max_tokens=1', ['training.eval_max_tokens=1']),
    ('--config.training.sequence_length=6000', ['training.sequence_length=6000', 'tokens']),
    ('--config.sharding.data=7', ['sharding.data=7', 'devices']),
    ('--config.sharding.cpu_devices=-1', ['sharding.cpu_devices=-1', 'not in [0, 512]']),
    ('--config.sharding.cpu_devices=513', ['sharding.cpu_devices=513', 'not in [0, 512]']),
    ('--config.optimizer.kind=muom', ['optimizer.kind', "did you mean 'muon'"]),
    ('--config.optimizer.average_decay=1', ['optimizer.average_decay=1', '[0, 1)']),
    ('--config.data.val_fraction=1.5', ['data.val_fraction=1.5']),
    ('--config.data.val_fraction=nan', ['data.val_fraction=nan']),
    ('--config.tokenizer.kind=chra', ['chra', "did you mean 'char'?"]),
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
    (b'', ['text.txt is empty']),
    (b'x', ['less than 2 characters']),
    (b'too short', ['tokens', '17']),
    (b'fine until here \xff and on' * 20, ['UTF-8', '0xff at offset 16']),
    (b'fine until here ' * 20 + b'\xe4\xb8', ['UTF-8', 'offset 320']),  # half a character at the end
    (b'fine until here \x00 and on' * 20, ['NUL', 'character 16']),
    (b'\xef\xbb\xbffine' * 20, ['begins with a byte-order mark']),
    (b'fine until here \xef\xbb\xbf and on' * 20, ['a byte-order mark', 'character 16']),
    (b'\xff\xfef\x00i\x00n\x00e\x00' * 20, ['UTF-8', '0xff at offset 0']),
  ],
)
def test_wrong_text(capsys, tmp_path, content, parts):
  path = tmp_path / 'text.txt'
  path.write_bytes(content)
  refuse_training(capsys, tmp_path, path, [], *parts)


GOOD_LINE = b'{"text": "she sells sea shells by the sea shore", "lang": "en"}\n'


@pytest.mark.parametrize(
  ('content', 'parts'),
  [
    (b'', ['text.jsonl is empty']),
    (GOOD_LINE * 2 + b'{"txt": "she sells"}\n' + GOOD_LINE, ['text.jsonl, line 3', 'data.field=text']),
    (GOOD_LINE * 2 + b'{"text": 3}\n' + GOOD_LINE, ['text.jsonl, line 3', 'data.field=text']),
    (GOOD_LINE + b'["text"]\n', ['text.jsonl, line 2', 'data.field=text']),
    (GOOD_LINE + b'{"text": "she"\n', ['text.jsonl, line 2', "isn't JSON"]),
    (GOOD_LINE + b'\n' + GOOD_LINE, ['text.jsonl, line 2', "isn't JSON"]),
    (GOOD_LINE + b'{"text": ""}\n', ['text.jsonl, line 2', 'empty']),
    (GOOD_LINE + b'{"text": "a\\u0000b"}\n', ['text.jsonl, line 2', 'NUL', 'character 1']),
    (GOOD_LINE + b'{"text": "a\\ud800b"}\n', ['text.jsonl, line 2', 'surrogate', 'character 1']),
    (GOOD_LINE + b'{"text": "\xff"}\n', ['text.jsonl, line 2', "isn't JSON"]),
  ],
)
def test_wrong_jsonl(capsys, tmp_path, content, parts):
  path = tmp_path / 'text.jsonl'
  path.write_bytes(content)
  refuse_training(capsys, tmp_path, path, [], *parts)


def test_wrong_field(capsys, tmp_path):
  path = tmp_path / 'text.jsonl'
  path.write_bytes(GOOD_LINE * 9)
  refuse_training(capsys, tmp_path, path, ['--config.data.field=txt'], 'text.jsonl, line 1', 'data.field=txt')


@pytest.mark.parametrize('name', ['text.txt.gz', 'text.txt.zst'])
def test_damaged_archive(capsys, tmp_path, name):
  path = tmp_path / name
  good = gzip.compress(b'she sells ' * 99) if name.endswith('gz') else zstandard.compress(b'she sells ' * 99)
  place = -8 if name.endswith('gz') else 6  # the sum that ends a .gz; the first block of a .zst, which has none
  for content in (b'she sells ' * 99, good[:-9], good[:place] + b'XXXX' + good[place + 4 :]):
    path.write_bytes(content)
    refuse_training(capsys, tmp_path, path, [], name, 'damaged')


TOKENIZER = '--config.tokenizer.'


@pytest.mark.parametrize(
  ('kind', 'field', 'parts'),
  [
    ('char', 'vocab_size=300', ['tokenizer.vocab_size=300', 'word or sentencepiece only, not char']),
    ('char', 'coverage=0.5', ['tokenizer.coverage=0.5', 'word only, not char']),
    ('char', 'standardize=true', ['tokenizer.standardize=True', 'word only, not char']),
    ('byte', 'unknown_symbol=?', ["tokenizer.unknown_symbol='?'", 'char only, not byte']),
    ('byte', 'model_path=x.model', ["tokenizer.model_path='x.model'", 'sentencepiece only, not byte']),
    ('word', 'model_type=unigram', ["tokenizer.model_type='unigram'", 'sentencepiece only, not word']),
    ('word', 'unknown_symbol=?', ["tokenizer.unknown_symbol='?'", 'char only, not word']),
    ('sentencepiece', 'coverage=0.5', ['tokenizer.coverage=0.5', 'word only, not sentencepiece']),
    ('sentencepiece', 'model_type=bep', ['tokenizer.model_type', "'bep'", "did you mean 'bpe'?"]),
    ('word', 'coverage=0', ['tokenizer.coverage=0', '(0, 1]']),
    ('word', 'coverage=nan', ['tokenizer.coverage=nan', '(0, 1]']),
    ('word', 'vocab_size=-1', ['tokenizer.vocab_size=-1', 'below 0']),
    ('word', 'vocab_size=5', ['tokenizer.vocab_size=5']),
    ('word', 'vocab_size=100000', ['tokenizer.vocab_size=100000']),  # the text has some 20 words
    ('sentencepiece', 'vocab_size=100000', ['tokenizer.vocab_size=100000']),
    ('sentencepiece', 'vocab_size=9', ['tokenizer.vocab_size=9']),
    ('sentencepiece', 'model_path=/nowhere.model', ['/nowhere.model', "can't be read"]),
    ('sentencepiece', 'model_path=/tmp', ['/tmp', "can't be read"]),
    ('char', 'unknown_symbl=?', ['tokenizer.unknown_symbl', 'did you mean tokenizer.unknown_symbol?']),
  ],
)
def test_wrong_tokenizer(capsys, tmp_path, text_file, kind, field, parts):
  refuse_training(capsys, tmp_path, text_file, [f'{TOKENIZER}kind={kind}', TOKENIZER + field], *parts)


@pytest.fixture(scope='module')
def piece_model(tmp_path_factory, text_file):
  path = tmp_path_factory.mktemp('pieces') / 'pieces'
  sentencepiece.SentencePieceTrainer.train(
    input=str(text_file), model_prefix=str(path), vocab_size=60, model_type='bpe', minloglevel=3
  )
  return path.with_suffix('.model').read_bytes()


@pytest.mark.parametrize('damage', ['empty', 'cut', 'text', 'mixed up', 'another size'])
def test_damaged_piece_model(capsys, tmp_path, text_file, piece_model, damage):
  path = tmp_path / 'pieces.model'
  middle = len(piece_model) // 2
  damaged = {
    'empty': b'',
    'cut': piece_model[:middle],
    'text': b'she sells sea shells ' * 9,
    'mixed up': piece_model[middle:] + piece_model[:middle],
    'another size': piece_model,
  }
  path.write_bytes(damaged[damage])
  flags = [f'{TOKENIZER}kind=sentencepiece', f'{TOKENIZER}model_path={path}']
  flags += [f'{TOKENIZER}vocab_size=61'] * (damage == 'another size')
  refuse_training(capsys, tmp_path, text_file, flags, str(path), 'tokenizer.')


@pytest.mark.parametrize(
  ('mixture', 'parts'),
  [
    ('shakespeare', ["'shakespeare' is not NAME:WEIGHT"]),
    ('shakespeare:many', ["'shakespeare:many' is not NAME:WEIGHT"]),
    ('shakespeare:0', ["'shakespeare:0'", 'above 0']),
    ('shakespeare:-1', ["'shakespeare:-1'", 'above 0']),
    ('shakespeare:inf', ["'shakespeare:inf'", 'above 0']),
    ('shakespeare:nan', ["'shakespeare:nan'", 'above 0']),
    (':3', ["':3'"]),
    ('TEXT:1,', ["''"]),
    ('TEXT:1,shakespear:1', ['shakespear']),
    ('TEXT:1,/nowhere.txt:1', ['/nowhere.txt']),
  ],
)
def test_wrong_mixture(capsys, tmp_path, text_file, mixture, parts):
  refuse_training(capsys, tmp_path, text_file, [f'--config.data.mixture={mixture.replace("TEXT", str(text_file))}'], *parts)


def test_more_corpora_than_streams(capsys, tmp_path, text_file):
  flags = ['--config.training.windows=contiguous', '--config.training.batch_size=1', '--config.training.sample_prompt=a']
  flags += [f'--config.data.mixture={text_file}:1,{text_file}:2', '--config.training.eval_max_tokens=0']
  workdir = tmp_path / 'run'
  capsys.readouterr()
  assert train.main(conftest.train_argv(workdir, text_file, *flags, config='shakespeare_lstm')) == 2
  check_line(capsys.readouterr().err, 'training.batch_size=1', '2 corpora')
  assert not workdir.exists()


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


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('e.model.attention_dropuot = 0.1', 'there is no field model.attention_dropuot; did you mean model.attention_dropout?'),
    ('e.training.num_stesp = 3', 'there is no field training.num_stesp; did you mean training.num_steps?'),
    ('e.sede = 3', 'there is no field sede; did you mean seed?'),
  ],
)
def test_config_file_that_sets_what_there_is_not(line, message, capsys, tmp_path):
  content = f'from textgen_jax import experiment\n\ndef get_config():\n  e = experiment.Experiment()\n  {line}\n  return e\n'
  (tmp_path / 'c.py').write_text(content)
  assert train.main(['train.py', f'--config={tmp_path}/c.py', f'--workdir={tmp_path}/run']) == 2
  check_line(capsys.readouterr().err, message)
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
    (['--length_penalty=400', '--best_of=2'], ['length_penalty=400.0', '[-10, 10]']),
    (['--draft_tokens=3'], ['--draft', 'drop --draft_tokens']),
    (['--draft_tokens=3', '--reproduce=/nowhere'], ['--draft', 'drop --draft_tokens']),
    (['--draft_tokens=65', '--draft=/nowhere'], ['draft_tokens=65', '[1, 64]']),
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


@pytest.fixture
def retokenized(tmp_path, trained):
  """A copy of the trained workdir whose checkpoints tell of another tokenizer."""
  workdir = tmp_path / 'retokenized'
  shutil.copytree(trained, workdir)
  conftest.change_about(workdir, tokenizer_sha256='f00d' * 16)
  return workdir


def test_checkpoint_of_another_tokenizer(capsys, retokenized, text_file):
  before = snapshot(retokenized)
  for main, argv in (
    (train.main, conftest.train_argv(retokenized, text_file, '--config.training.num_steps=9')),
    (sample.main, ['sample.py', f'--workdir={retokenized}']),
    (evaluate.main, ['evaluate', f'--workdir={retokenized}']),
    (evaluate.main, ['evaluate', f'--workdir={retokenized}', f'--data={text_file}']),
  ):
    capsys.readouterr()
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ''
    check_line(err, str(retokenized), 'tokenizer', 'f00df00df00d')
    assert snapshot(retokenized) == before


def test_init_from_a_checkpoint_of_another_tokenizer(capsys, retokenized, tmp_path, text_file):
  refuse_training(capsys, tmp_path, text_file, [f'--config.init_from={retokenized}'], 'init_from', str(retokenized), 'f00df00df00d')


@pytest.mark.parametrize(
  ('flags', 'parts'),
  [
    (['--stride=-1'], ['stride=-1', '[1, 16]']),
    (['--stride=17'], ['stride=17', '[1, 16]']),
    (['--stride=half'], ['stride', 'half']),
    (['--strid=1'], ['--strid', 'did you mean --stride?']),
    (['--split=tset'], ["split='tset'", 'train, val']),
    (['--split=test'], ["split='test'", 'train, val']),
    (['--split=val', '--data=x'], ['--split and --data']),
    (['--data=/nowhere.txt'], ['/nowhere.txt', "doesn't exist"]),
    (['--batch_size=0'], ['batch_size=0', 'below 1']),
    (['--checkpoint=bset'], ['bset', 'best, latest, ']),
    (['--workdir=/nowhere'], ['/nowhere', 'no checkpoint was ever written']),
  ],
)
def test_wrong_evaluation(capsys, trained, flags, parts):
  before = snapshot(trained)
  capsys.readouterr()
  assert evaluate.main(['evaluate', f'--workdir={trained}', *flags]) == 2
  out, err = capsys.readouterr()
  assert out == ''
  check_line(err, *parts)
  assert snapshot(trained) == before
  check_cache()


def test_text_that_the_trained_tokenizer_does_not_know(capsys, tmp_path, trained):
  path = tmp_path / 'zoo.jsonl'
  path.write_text('{"text": "the king"}\n{"text": "the Zoo"}\n')
  capsys.readouterr()
  assert evaluate.main(['evaluate', f'--workdir={trained}', f'--data={path}']) == 2
  check_line(capsys.readouterr().err, 'zoo.jsonl:2', "'Z' at offset 4")


def test_no_stride_where_the_state_is_carried(capsys, tmp_path, text_file):
  workdir = tmp_path / 'lstm'
  assert train.main(conftest.train_argv(workdir, text_file, '--config.training.windows=contiguous', config='shakespeare_lstm')) == 0
  capsys.readouterr()
  assert evaluate.main(['evaluate', f'--workdir={workdir}', '--stride=4']) == 2
  check_line(capsys.readouterr().err, 'stride=4', 'carries its state')


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
