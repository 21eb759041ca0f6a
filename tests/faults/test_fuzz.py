"""Whatever stands in flags and files: no traceback, a documented exit code, and one line that says what is wrong.

EXAMPLES each, the same every time. TEXTGEN_JAX_FUZZ_SECONDS=60 looks for new ones, for so long in each test.
"""

import contextlib
import copy
import dataclasses
import gzip
import io
import json
import os
import pathlib
import re
import sys
import time

import conftest
import hypothesis
import pytest
import sentencepiece as sentencepiece_library
import zstandard
from hypothesis import strategies as st

import sample
import train
from textgen_jax import assembly, command_line, errors, generator, trainer, workdir
from textgen_jax import experiment as experiment_lib
from textgen_jax.data import downloads
from textgen_jax.sampling import generate
from textgen_jax.text import base, build
from textgen_jax.tools import corpora, evaluate, inspect_samples, score, sweep_sampling
from textgen_jax.tools import tokenize as tokenize_tool

SECONDS = float(os.environ.get('TEXTGEN_JAX_FUZZ_SECONDS', '0'))
EXAMPLES = 100
CODES = {0, 2, 3, 4, 5, 75}
TEXT = 'the king went over hill [and] "sea", don\'t - ROMEO: \u00e9\u4e16\U0001f600\n'


class ReachedError(Exception):
  """Everything is checked, and the work would begin."""


def fuzz(check, *strategies):
  how = {'deadline': None, 'database': None, 'suppress_health_check': list(hypothesis.HealthCheck)}

  def run(**more):
    hypothesis.settings(**how, **more)(hypothesis.given(st.tuples(*strategies))(lambda args: check(*args)))()

  if not SECONDS:
    run(max_examples=EXAMPLES, derandomize=True)
  end = time.monotonic() + SECONDS
  while time.monotonic() < end:
    run(max_examples=200)


def check_line(line):
  assert line.startswith('error: ')
  assert len(line) <= 300
  assert line.isprintable()


def attempt(main, argv, stdin=''):
  """Runs a command as far as ReachedError; anything else that is raised is a traceback."""
  out, err = io.StringIO(), io.StringIO()
  given = io.StringIO(stdin)
  given.reconfigure, given.buffer = lambda **_: None, io.BytesIO(stdin.encode('utf-8', 'replace'))
  before, sys.stdin = sys.stdin, given
  try:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      code = main(argv)
  except ReachedError:
    code = 0
  finally:
    sys.stdin = before
  assert code in CODES
  assert 'Traceback' not in err.getvalue()
  lines = err.getvalue().strip('\n').split('\n')
  if code:
    check_line(lines[-1])
    assert [line.startswith('error: ') for line in lines].count(True) == 1
  return code


def told(function, *args):
  """What `function` gives; None where a RunError says in a good line why not."""
  try:
    return function(*args)
  except errors.RunError as error:
    line = command_line.one_line(f'error: {error}')
    check_line(line)
    return None


# Values.

WORDS = [
  '', ' ', '0', '-1', '1', '2', '3.5', '1e999', '-inf', 'nan', 'true', 'None', '()', '[]', '{}', '(1,2)', '1,2', '0.5,', '(' * 5000,
  '[' * 5000,  '-' * 5000, '1' * 5000, '0x10', '1_0', '\x00', '\ud800', '\udc80', '\x1b[31m', '\u202e', 'a' * 5000,
  '..', './', '/dev/null', '/dev/zero',
  '~', '~nobody/x', '//', '=', '--', '*', '[', '%s', '{0}', 'byte', 'char', 'word', 'sentencepiece', 'unigram', 'contiguous', 'cosine',
  'linear', 'rotary', 'learned', 'jsonl', 'text', 'latest', 'best', 'val', 'train', '10:15', '5:3', '99999999999999999999', '2147483648',
  '__import__("os")',
  '(a+)+b', 'a{3}', '(?i)x', '\\', '1:2', '1:nan', ':', '17:2.5,18:-1', 'shakespeare:3', 'i am: 1',
]  # fmt: skip
anything = st.one_of(
  st.sampled_from(WORDS), st.text(max_size=20), st.integers().map(str), st.floats().map(str), st.integers(-3, 70).map(str),
  st.floats(0, 1).map(str),
)  # fmt: skip
simple = st.one_of(
  st.none(), st.booleans(), st.integers(), st.integers(-2, 70), st.floats(), st.text(max_size=8), st.sampled_from(WORDS),
  st.sampled_from([10**30, 10**4000, -(2**63), 1e308, 2**31]),
)  # fmt: skip
junk = st.recursive(simple, lambda one: st.lists(one, max_size=3) | st.dictionaries(st.text(max_size=5), one, max_size=3), max_leaves=6)


def places(value, at=()):
  """Every place in a JSON value."""
  yield at
  for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
    yield from places(value[key], (*at, key))


@st.composite
def mutated(draw, value):
  """A JSON value, of which up to three places are changed."""
  value = copy.deepcopy(value)
  for _ in range(draw(st.integers(0, 3))):
    at = draw(st.sampled_from([*places(value)]))
    if not at:
      return draw(junk)
    (*path, last), inside = at, value
    for key in path:
      inside = inside[key]
    match draw(st.integers(0, 3)):
      case 0:
        del inside[last]
      case 1 if isinstance(inside, dict):
        inside[draw(st.text(max_size=5))] = draw(junk)
      case 2 if isinstance(inside, list):
        inside.insert(last, draw(junk))
      case _:
        inside[last] = draw(junk)
  return value


def dumped(value):
  """JSON as a stranger may write it, lone surrogates and numbers of any length too."""
  before = sys.get_int_max_str_digits()
  sys.set_int_max_str_digits(0)
  try:
    return json.dumps(value).encode()
  finally:
    sys.set_int_max_str_digits(before)


@st.composite
def damaged(draw, data):
  """Bytes, of which some are cut, changed, doubled, or none."""
  for _ in range(draw(st.integers(0, 3))):
    at, to = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
    filling = draw(st.one_of(st.binary(max_size=8), st.sampled_from([b'', b'\n', b'{', b'[' * 5000, b'\xff', b'\x00', b'1' * 5000, b'"'])))
    data = draw(st.sampled_from([data[:at], data[:at] + filling + data[to:], data[:at] + filling + data[at:], data[at:] + data[:at], data]))
  return data


def plausible(default, texts):
  """Values of the type that a flag's default has."""
  numbers = st.sampled_from(['0', '1', '-1', '2', '3', '1024', '2147483647', '4294967296', '1' * 30])
  if default in ('True', 'False'):
    return st.sampled_from(['true', 'false', '1', '0'])
  if re.fullmatch(r'-?\d+', default):
    return st.integers(-2, 70).map(str) | numbers
  if re.fullmatch(r'-?(\d+\.\d*|inf|nan)(e.*)?', default):
    return st.floats(0, 1).map(str) | st.floats().map(str) | numbers
  return texts


def flag_lists(defaults, texts=anything):
  """Flags with the types of these defaults; now and then something else."""
  known = st.sampled_from(sorted(defaults))
  fitting = known.flatmap(lambda name: st.builds('--{}={}'.format, st.just(name), plausible(defaults[name], texts)))
  name = st.one_of(known, known.map(lambda one: one[:-1]), st.text(max_size=5))
  odd = st.one_of(st.builds('{}{}={}'.format, st.sampled_from(['--', '-', '--no', '']), name, anything), known.map('--{}'.format), anything)
  good = st.lists(fitting, min_size=1, max_size=4)
  return st.one_of(good, good, good, st.lists(fitting | odd, max_size=4))


# Commands.


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
  """Relative paths lead nowhere, and nothing is fetched."""
  monkeypatch.chdir(tmp_path)

  def offline(*_):
    raise errors.MachineFailed('offline')

  monkeypatch.setattr(downloads, 'wheel', offline)
  monkeypatch.setattr(downloads, 'url', offline)


def reach(*_, **__):
  raise ReachedError


def untraced(monkeypatch):
  """Training ends where everything is read and built, before the model is traced."""
  monkeypatch.setattr(assembly.state, 'create', lambda *_: (None, None, None))
  monkeypatch.setattr(trainer, 'train', lambda experiment, directory: assembly.Parts(experiment, pathlib.Path(directory), None))


def fields_of(config, prefix='config.'):
  """Names and defaults of a configuration's fields."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    yield prefix + field.name, str(value)
    if dataclasses.is_dataclass(value):
      yield from fields_of(value, f'{prefix}{field.name}.')


def is_wide(flag):
  """Whether a text would be much of this machine."""
  return bool(re.match(r'-*config\.data\.(path|mixture)\b', flag)) and any(
    part.strip() and (os.path.isdir(os.path.expanduser(part.strip())) or set('*?[') & set(part))
    for part in [flag.partition('=')[2], *re.split('[,:]', flag.partition('=')[2])]
  )


def test_configurations(monkeypatch, tmp_path, text_file):
  untraced(monkeypatch)
  configs = [command_line.load_config(f'{conftest.CONFIGS}/{config}.py') for config in ('debug', 'shakespeare_lstm')]
  defaults = dict.fromkeys(('config', 'workdir', 'flagfile', 'undefok'), '') | {k: v for config in configs for k, v in fields_of(config)}

  def check(config, flags):
    hypothesis.assume(not any(map(is_wide, flags)))
    attempt(train.main, conftest.train_argv(tmp_path / 'run', text_file, *flags, config=config))

  fuzz(check, st.sampled_from(['debug', 'shakespeare_lstm']), flag_lists(defaults))


def test_configurations_of_a_stranger(text_file):
  experiments = [command_line.load_config(f'{conftest.CONFIGS}/{name}.py') for name in ('debug', 'shakespeare_lstm', 'gpt2_124m')]

  def check(content):
    told(experiment_lib.from_json, content, 'config.json')
    told(workdir.described, {'experiment': content, 'fingerprint': 'f'}, 'checkpoints/1')
    told(workdir.described, content, 'checkpoints/1')

  fuzz(check, st.one_of([mutated(experiment_lib.to_json(one)) for one in experiments]))


@pytest.fixture
def unwritten(monkeypatch, trained):
  """The model is loaded once, and writes nothing."""
  kept, real = generator.Generator.load(trained), sample._load

  def load(values, checkpoint):
    if (values.workdir, checkpoint, values.draft) != (str(trained), 'best', None):
      return real(values, checkpoint)
    return generator.Generator(kept.model, kept.params, kept.tokenizer, kept.step)

  monkeypatch.setattr(sample, '_load', load)
  monkeypatch.setattr(generate, 'complete', reach)
  monkeypatch.setattr(generate._Rows, '__iter__', lambda self: iter(()))
  return ['sample.py', f'--workdir={trained}']


def flags_of(main):
  """A command's flags and their defaults, from its help."""
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    assert main(['x', '--help']) == 0
  return dict(re.findall(r'^  --(\w+)=(.*?): ', out.getvalue(), re.MULTILINE))


def test_flags_of_sampling(unwritten, trained):
  values = st.one_of(anything, st.just('the king'), st.just(str(trained)))
  def check(flags):
    attempt(sample.main, [*unwritten, *flags], 'the\n\nking')

  fuzz(check, flag_lists(flags_of(sample.main), values))


TOOLS = [evaluate, score, inspect_samples, sweep_sampling, tokenize_tool, corpora]


@pytest.mark.parametrize('tool', TOOLS, ids=lambda tool: tool.__name__.split('.')[-1])
def test_flags_of_tools(monkeypatch, tool, text_file, trained):
  monkeypatch.setattr(workdir, 'load', reach)
  monkeypatch.setattr(tokenize_tool.prepare, 'prepare', reach)
  monkeypatch.setattr(corpora, '_table', reach)
  values = st.one_of(anything, st.sampled_from([str(text_file), str(trained), 'python_stdlib', 'tunes']))

  def check(flags):
    hypothesis.assume(not any(os.path.isdir(os.path.expanduser(flag.partition('=')[2].strip())) for flag in flags))
    attempt(tool.main, ['tool', *flags])

  fuzz(check, flag_lists(flags_of(tool.main), values))


@pytest.mark.parametrize('name', ['text.txt', 'text.jsonl', 'text.gz', 'text.jsonl.zst'])
def test_texts(monkeypatch, tmp_path, name):
  untraced(monkeypatch)
  path = tmp_path / name
  row = b'{"text": "she sells sea shells by the sea shore", "n": [1, {"a": null}]}\n'
  good = row * 20 if 'jsonl' in name else b'she sells sea shells \xc3\xa9\n' * 20
  good = {'gz': gzip.compress, 'zst': zstandard.compress}.get(name.split('.')[-1], bytes)(good)

  def check(content, kind):
    path.write_bytes(content)
    attempt(train.main, conftest.train_argv(tmp_path / 'run', path, f'--config.tokenizer.kind={kind}'))

  fuzz(check, damaged(good), st.sampled_from(['char', 'byte', 'word']))


@pytest.mark.parametrize('name', ['p.txt', 'p.jsonl', '-'])
def test_prompts(unwritten, tmp_path, name):
  good = b'{"prompt": "the king", "more": [1]}\n{"prompt": ""}\n' if name == 'p.jsonl' else b'the king\n\nto sea\r\n'

  def check(content):
    (tmp_path / 'p').write_bytes(content) if name == '-' else (tmp_path / name).write_bytes(content)
    attempt(sample.main, [*unwritten, f'--prompts_file={name if name == "-" else tmp_path / name}'], content.decode('utf-8', 'replace'))

  fuzz(check, st.one_of(damaged(good), st.binary(max_size=50), st.lists(junk, max_size=4).map(lambda rows: b'\n'.join(map(dumped, rows)))))


def test_conversations(unwritten):
  commands = ['the king', '/show', '/help', '/again', '/new', '//x', '/temperature', '/stop_regex (a', '/regex [']
  line = st.one_of(anything, st.sampled_from(commands))
  lines = st.lists(st.one_of(line, st.builds('/{} {}'.format, st.sampled_from(sorted(sample.interactive.FIELDS)), anything)), max_size=8)

  def check(given):
    assert attempt(sample.main, [*unwritten, '--interactive'], '\n'.join(given)) in (0, 2)

  fuzz(check, lines)


@pytest.fixture
def written(monkeypatch, tmp_path, trained):
  """A manifest, and a journal of the first of two batches."""
  source = generator.Generator.load(trained)
  source.generate(['the king', 'a ship'], sample.params.SamplingParams(max_new_tokens=3, num_samples=2, log_probs=True))
  made = ''.join(source.manifest())
  real, calls = generate.complete, []

  def complete(*args):
    calls.append(args)
    if len(calls) > 1:
      raise KeyboardInterrupt
    return real(*args)

  with monkeypatch.context() as patch:
    patch.setattr(generate, 'complete', complete)
    flags = ['--prompt=the king', '--prompt=a ship', '--batch_size=1', '--max_new_tokens=3', '--log_probs', '--alternatives=1']
    assert sample.main(['sample.py', f'--workdir={trained}', *flags, '--format=jsonl', f'--output={tmp_path}/texts']) == 130
  return made, (tmp_path / 'texts.partial').read_bytes(), flags


def rows_of(text):
  return [json.loads(line) for line in text.splitlines()]


def as_lines(rows):
  return b''.join(dumped(row) + b'\n' for row in rows) if isinstance(rows, list) else dumped(rows)


def test_manifests(written, unwritten, tmp_path):
  made, path = written[0], tmp_path / 'manifest'

  def check(content):
    path.write_bytes(content)
    attempt(sample.main, [*unwritten, f'--reproduce={path}'])

  fuzz(check, st.one_of(mutated(rows_of(made)).map(as_lines), damaged(made.encode())))


def test_journals(written, unwritten, tmp_path):
  kept, flags = written[1:]
  argv = [*unwritten, *flags, '--format=jsonl', f'--output={tmp_path}/texts']

  def check(content):
    (tmp_path / 'texts.partial').write_bytes(content)
    attempt(sample.main, argv)
    assert not (tmp_path / 'texts').exists()

  fuzz(check, st.one_of(mutated(rows_of(kept)).map(as_lines), damaged(kept)))


def piece_model(**fields):
  written = io.BytesIO()
  sentencepiece_library.SentencePieceTrainer.train(
    sentence_iterator=iter([TEXT.strip()] * 20), model_writer=written, vocab_size=320, byte_fallback=True, hard_vocab_limit=False,
    minloglevel=3, **fields,
  )  # fmt: skip
  return written.getvalue()


def use(tokenizer):
  """Everything that a tokenizer is asked for."""
  if tokenizer is None:
    return
  for text in (TEXT, '', ' a  b ', TEXT[::-1]):
    ids = told(tokenizer.encode, text)
    if ids is not None:
      assert isinstance(tokenizer.decode(ids), str)
      assert isinstance(''.join(base.token_texts(tokenizer, ids)), str)
    told(tokenizer.unknowns, text)
    assert 0 <= tokenizer.cut(text) <= len(text)
  assert len(tokenizer.pieces()) == tokenizer.vocab_size == len(tokenizer.spelling().texts[0])
  assert len(tokenizer.fingerprint()) == 64


@pytest.mark.parametrize('kind', ['char', 'byte', 'word', 'sentencepiece'])
def test_tokenizers(tmp_path, kind):
  fields = build.train(base.TokenizerConfig(kind=kind), [TEXT * 20]).fields()

  def check(content):
    (tmp_path / base.FILE_NAME).write_bytes(content)
    use(told(build.load, tmp_path))
    with contextlib.suppress(ValueError, RecursionError):
      told(workdir.tokenizer_from, {base.FILE_NAME: json.loads(content)})

  fuzz(check, st.one_of(mutated(fields).map(dumped), damaged(dumped(fields)), st.binary(max_size=40)))


@pytest.mark.parametrize('kind', ['bpe', 'unigram', 'nmt'])
def test_models_of_pieces(tmp_path, kind):
  model = {
    'bpe': lambda: piece_model(model_type='bpe', normalization_rule_name='identity'),
    'unigram': lambda: piece_model(normalization_rule_name='identity'),
    'nmt': lambda: piece_model(normalization_rule_name='nmt_nfkc'),
  }[kind]()
  path = tmp_path / 'tokenizer.model'

  def check(content):
    path.write_bytes(content)
    config = base.TokenizerConfig(kind='sentencepiece', model_path=str(path))
    use(told(build.train, config, iter(())))

  fuzz(check, st.one_of(damaged(model), damaged(model[-400:]).map(lambda end: model[:-400] + end)))


def test_the_fuzz_sees_what_it_looks_for():
  def long(_):
    raise errors.UserError('x' * 1000)

  for wrong in (lambda _: 1 / 0, lambda argv: 7, lambda argv: print('Traceback', file=sys.stderr), lambda argv: 2):
    with pytest.raises((AssertionError, ZeroDivisionError)):
      attempt(wrong, [])
  assert attempt(lambda argv: command_line.run(long, argv), []) == 2
  seen = []
  fuzz(seen.append, damaged(b'0123456789'))
  assert len(set(seen)) > 10
