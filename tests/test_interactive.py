"""The conversation: prompts, going on, commands, and Ctrl-C."""

import io
import os
import pathlib
import signal
import subprocess
import sys

import pytest

import sample
from textgen_jax import errors, interactive
from textgen_jax.sampling.params import SamplingParams

ROOT = pathlib.Path(__file__).parent.parent


class Fake:
  """Writes ' one two' after whatever it is asked, and keeps what that was."""

  def __init__(self):
    self.asked = []

  def stream(self, prompt, settings):
    if 'Z' in prompt:
      raise errors.UserError("prompt: 'Z' is unknown")
    self.asked.append((prompt, settings))
    yield from (' one', ' two')


class Stopped(Fake):
  """Ctrl-C is pressed after the first piece."""

  def stream(self, prompt, settings):
    yield next(super().stream(prompt, settings))
    raise KeyboardInterrupt


def talk(lines, source=None, settings=None):
  """The session's end: the fake, what was written, what was told, and whether it is still open."""
  source, written, told = source or Fake(), [], []
  session = interactive.Session(source, settings or SamplingParams(), written.append, told.append)
  still = [session.answer(line) for line in lines]
  return source.asked, ''.join(written), told, still[-1]


def test_a_prompt_and_an_empty_line_that_goes_on():
  asked, written, told, still = talk(['ROMEO:', '', ''])
  assert [prompt for prompt, _ in asked] == ['ROMEO:', 'ROMEO: one two', 'ROMEO: one two one two']
  assert written == 'ROMEO: one two\n one two\n one two\n'
  assert (told, still) == ([], True)


def test_the_temperature_is_changed_in_the_middle_of_a_text():
  asked, _, told, _ = talk(['a', '/temperature 0.5', '', '/temperature', 'b'])
  assert [(prompt, one.temperature) for prompt, one in asked] == [('a', 1.0), ('a one two', 0.5), ('b', 1.0)]
  assert told == ['temperature = 0.5', 'temperature = 1.0']


def test_a_document_begins_where_nothing_was_written():
  asked, written, _, _ = talk(['', '', 'a', '', '/new', ''])
  assert [(prompt, one.begins_document) for prompt, one in asked] == [
    ('', True), (' one two', True), ('a', False), ('a one two', False), ('', True),
  ]  # fmt: skip
  assert written.startswith(' one two\n one two\na one two\n')
  assert talk(['a'], settings=SamplingParams(begins_document=True))[0][0][1].begins_document


def test_again_is_another_seed_of_the_same_prompt():
  asked, written, told, _ = talk(['a', '/again', '/again', 'b'], settings=SamplingParams(seed=2**32 - 1))
  assert [(prompt, one.seed) for prompt, one in asked] == [('a', 2**32 - 1), ('a', 0), ('a', 1), ('b', 1)]
  assert written == 'a one two\n' * 3 + 'b one two\n'
  assert told == ['seed = 0', 'seed = 1']


def test_ctrl_c_stops_a_text_that_then_goes_on():
  asked, written, told, still = talk(['a', '/temperature 2', ''], Stopped())
  assert [(prompt, one.temperature) for prompt, one in asked] == [('a', 1.0), ('a one', 2.0)]
  assert written == 'a one\n one\n'
  assert ['stopped' in line for line in told] == [True, False, True]
  assert still


def test_half_a_character_at_the_end_is_no_prompt():
  class Cut(Fake):
    def stream(self, prompt, settings):
      self.asked.append((prompt, settings))
      yield 'é\ufffd'

  assert [prompt for prompt, _ in talk(['a', '', ''], Cut())[0]] == ['a', 'aé', 'aéé']


@pytest.mark.parametrize(
  ('line', 'parts'),
  [
    ('Zoo', ["'Z' is unknown"]),
    ('/tempratur 1', ['no /tempratur', 'did you mean /temperature?']),
    ('/shwo', ['did you mean /show?']),
    ('/', ['/help']),
    ('/qqqqqq', ['/help lists']),
    ('/temperature hot', ["temperature='hot' is not a number"]),
    ('/temperature nan', ['temperature=nan']),
    ('/top_k 1.5', ["top_k='1.5' is not a whole number"]),
    ('/top_p 1.5', ['top_p=1.5', '(0, 1]']),
    ('/stop_at_end maybe', ["stop_at_end='maybe'"]),
    ('/stop_regex (', ['stop_regex']),
    ('/num_samples 2', ['no /num_samples']),
    ('/begins_document false', ['no /begins_document']),  # the generator would insist on it
  ],
)
def test_wrong_lines_are_told_in_one_and_change_nothing(line, parts):
  asked, written, told, still = talk(['a', line, '', '/show'], settings=SamplingParams(top_k=3))
  assert (len(told[0].splitlines()), told[1:], still) == (1, ['top_k = 3'], True)
  assert all(part in told[0] for part in parts)
  assert [prompt for prompt, _ in asked] == ['a', 'a one two']
  assert written == 'a one two\n one two\n'


def test_commands():
  asked, _, told, _ = talk(['/show', '/nostop', '/stop_at_end off', '/regex a b', '/top_k  7 ', '/show', '//x', '/help'])
  assert told[0] == 'every setting has its default'
  assert told[5].splitlines() == ['top_k = 7', "regex = 'a b'", 'stop_at_end = False']
  assert asked[0][0] == '/x'
  assert asked[0][1] == SamplingParams(top_k=7, regex='a b', stop_at_end=False)
  named = {line.split()[0].rstrip(':') for line in told[6].splitlines() if line.startswith('  /')}
  assert named == {f'/{name}' for name in [*interactive.COMMANDS, *interactive.FIELDS]}
  assert {'/temperature', '/top_p', '/seed', '/max_new_tokens', '/stop_at_end', '/regex'} <= named
  assert talk(['/quit'])[3] is False


def test_a_session_ends_with_its_lines_or_at_quit():
  for lines in (['a'], ['a', '/quit', 'b']):
    source, written = Fake(), []
    interactive.run(source, SamplingParams(), lines, written.append)
    assert [prompt for prompt, _ in source.asked] == ['a']


def converse(monkeypatch, capsys, trained, data, *flags):
  monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(data), 'utf-8'))
  capsys.readouterr()
  code = sample.main(['sample.py', f'--workdir={trained}', '--interactive', *flags])
  return code, *capsys.readouterr()


def test_the_command_writes_what_streams_do(monkeypatch, capsys, trained):
  def stream(*flags):
    capsys.readouterr()
    assert sample.main(['sample.py', f'--workdir={trained}', '--stream', *flags]) == 0
    return capsys.readouterr().out

  data = b'the king\r\nZoo\nsea\xff\n/temperature 0.2\n/max_new_tokens 8\nsea\n'
  code, out, err = converse(monkeypatch, capsys, trained, data, '--seed=4', '--max_new_tokens=5')
  assert code == 0
  expected = stream('--prompt=the king', '--seed=4', '--max_new_tokens=5')
  assert out == expected + stream('--prompt=sea', '--seed=4', '--max_new_tokens=8', '--temperature=0.2')
  assert [part in line for part, line in zip(["'Z'", 'UTF-8', 'temperature', 'max_new'], err.splitlines(), strict=True)] == [True] * 4


def test_a_document_begins_where_the_flag_says_so(monkeypatch, capsys, trained):
  code, out, _ = converse(monkeypatch, capsys, trained, b'sea\n', '--begins_document', '--max_new_tokens=9')
  flags = ['--prompt=sea', '--begins_document', '--max_new_tokens=9', '--stream']
  assert (code, sample.main(['sample.py', f'--workdir={trained}', *flags])) == (0, 0)
  assert out == capsys.readouterr().out


def test_nothing_to_answer(monkeypatch, capsys, trained):
  assert converse(monkeypatch, capsys, trained, b'')[:2] == (0, '')
  monkeypatch.setattr(sys, 'stdin', None)
  assert list(interactive.read_lines()) == []


@pytest.mark.parametrize('flag', ['--prompt=a', '--stream', '--num_samples=2', '--output=new', '--manifest=new', '--format=jsonl'])
def test_flags_that_the_conversation_does_not_read(monkeypatch, capsys, trained, flag):
  code, out, err = converse(monkeypatch, capsys, trained, b'a\n', flag)
  assert (code, out, len(err.splitlines())) == (2, '', 1)
  assert 'to stdout' in err


def test_signals_of_a_real_process(trained):
  """Ctrl-C while it writes stops the text; Ctrl-C while it waits for a line ends the process."""
  argv = [sys.executable, '-u', 'sample.py', f'--workdir={trained}', '--interactive', '--nostop_at_end', '--max_new_tokens=1000000']
  with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
    process.stdin.write(b'the king\n')
    assert process.stdout.read(200).startswith(b'the king')
    process.send_signal(signal.SIGINT)
    process.stdin.write(b'/temperature 0.1\n/max_new_tokens 3\n\n/show\n')
    told = b''
    while told.count(b'max_new_tokens = 3') < 2:  # the second time as the last command's answer
      new = os.read(process.stderr.fileno(), 1000)
      assert new, told
      told += new
    process.send_signal(signal.SIGINT)
    told += process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert b'stopped' in told
    assert b'temperature = 0.1' in told
    assert b'Traceback' not in told


def test_a_text_that_does_not_fit_in_memory_ends_no_session():
  class Large(Fake):
    def stream(self, prompt, settings):
      raise RuntimeError('RESOURCE_EXHAUSTED: out of memory allocating 99999999999 bytes')
      yield

  told = []
  session = interactive.Session(Large(), SamplingParams(), lambda piece: None, told.append)
  assert session.answer('a')
  assert told == ['error: out of memory: a smaller max_new_tokens takes less']
