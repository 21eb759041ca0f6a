"""Batches in order, files that outlive a kill, models of one's own."""

import dataclasses
import errno
import fcntl
import json
import math
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import sample
from textgen_jax import errors, generator
from textgen_jax.sampling import batching, generate, journal
from textgen_jax.sampling.params import SamplingParams
from textgen_jax.text import byte

ROOT = pathlib.Path(__file__).parent.parent
PROMPTS = ['the king', 'a', 'see a ship of war come home from sea', '', 'sea', 'hill field', 'fool']
SHORT = SamplingParams(max_new_tokens=5, stop_at_end=False)


class Successor:
  """Certain that n is followed by n + 1: all of the contract that sampling uses."""

  vocab_size, context_length, window, slides = 257, 8, None, False

  def init_cache(self, batch, length, rewinds=0):
    return jnp.zeros((batch, 1))

  def grow_cache(self, cache, length):
    return cache

  def apply(self, variables, x, cache=None, valid_BT=None, method=None):
    return jnp.log(jax.nn.one_hot((x + 1) % 257, 257)) if method == 'unembed' else (x, cache)


@pytest.fixture(scope='module')
def writer(trained):
  return generator.Generator.load(trained)


@pytest.fixture
def batches(monkeypatch):
  """The prompts of each batch that is generated. `batches.stop(n)` raises an error once n are."""

  class Seen(list):
    stop_at, error = None, None

    def stop(self, count, error=KeyboardInterrupt):
      self.stop_at, self.error = len(self) + count, error

  seen, real = Seen(), generate.complete

  def completing(model, params, tokenizer, batch, *rest):
    if seen.stop_at == len(seen):
      raise seen.error
    seen.append(list(batch.prompts))
    return real(model, params, tokenizer, batch, *rest)

  monkeypatch.setattr(generate, 'complete', completing)
  return seen


def counting():
  return generator.Generator(Successor(), {}, byte.ByteTokenizer())


def skip(logits_BV, history):
  """A transform after which n is followed by n + 2."""
  return jnp.roll(logits_BV, 1, axis=-1)


def test_batches_by_hand():
  assert batching.cut([2, 9, 4, 9], [1, 2, 1, 5], 3) == [[1], [3], [2, 0]]  # 5 rows of one prompt stay together
  assert batching.cut([1, 1, 1, 1, 1], [1] * 5, 2) == [[0, 1], [2, 3], [4]]
  assert batching.cut([], [], 2) == []


def test_small_batches_give_what_one_gives(writer, batches):
  settings = [dataclasses.replace(SHORT, temperature=0.3 * i, num_samples=1 + i % 3, seed=i) for i in range(len(PROMPTS))]
  settings[4] = dataclasses.replace(settings[4], temperature=1.0, num_samples=1, best_of=3)
  whole = writer.generate(PROMPTS, settings)
  assert len(batches) == 1
  assert [one.prompt for one in whole] == [p for p, one in zip(PROMPTS, settings, strict=True) for _ in range(one.num_samples)]
  small = writer.generate(PROMPTS, settings, batch_size=3)
  assert small == whole
  cut = batches[1:]
  assert [prompt for batch in cut for prompt in batch] == sorted(PROMPTS, key=len, reverse=True)
  rows = {prompt: one.rows() for prompt, one in zip(PROMPTS, settings, strict=True)}
  assert all(sum(rows[prompt] for prompt in batch) <= 3 for batch in cut)
  assert len(cut) == 5
  assert whole == generate.generate(writer.model, writer.params, writer.tokenizer, PROMPTS, settings)
  assert writer.generate([]) == []


def test_any_model_of_the_contract(tmp_path):
  prompts = ['a', 'bc', 'x', '0']
  settings = [SamplingParams(max_new_tokens=n, alternatives=2) for n in (3, 5, 1, 4)]
  made = counting().generate(prompts, settings, batch_size=2)
  assert [one.text for one in made] == ['bcd', 'defgh', 'y', '1234']
  assert ''.join(counting().stream('a', settings[1])) == 'bcdef'
  plain = [dataclasses.replace(one, alternatives=0) for one in settings]
  skipping = counting().generate(prompts, plain, transforms=[skip])
  assert [one.text for one in skipping] == ['ceg', 'egikm', 'z', '2468']
  assert counting().generate_to(tmp_path / 'out.jsonl', prompts, settings, batch_size=2) == made
  rows = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
  assert [row['text'] for row in rows] == [one.text for one in made]
  assert rows[2]['alternatives'][0] == [[ord('y'), 0.0], [0, None]]  # the second one's log-probability is -inf, which JSON hasn't


def test_texts_that_were_kept_are_what_was_made(batches, tmp_path):
  settings = SamplingParams(max_new_tokens=2, log_probs=True, alternatives=2, best_of=2)
  ask = {'prompts': ['b', 'd'], 'settings': settings, 'batch_size': 2, 'transforms': [skip]}
  made = counting().generate(**ask)
  assert [(one.text, one.log_probs, one.alternatives[0][1][1], one.score) for one in made] == [
    ('df', [-math.inf] * 2, -math.inf, -math.inf),
    ('fh', [-math.inf] * 2, -math.inf, -math.inf),
  ]
  batches.stop(1)
  with pytest.raises(KeyboardInterrupt, match='keeps 1 of 2 texts'):
    counting().generate_to(tmp_path / 'out.jsonl', **ask)
  batches.stop(9)
  source = counting()
  assert source.generate_to(tmp_path / 'out.jsonl', **ask) == made
  assert source.timing.texts == 1
  counting().generate_to(tmp_path / 'whole.jsonl', **ask)
  assert (tmp_path / 'out.jsonl').read_bytes() == (tmp_path / 'whole.jsonl').read_bytes()


def test_a_stream_joins_to_the_text_and_is_checked_when_called(writer):
  settings = dataclasses.replace(SHORT, max_new_tokens=70)
  pieces = list(writer.stream('the', settings))
  assert len(pieces) > 1
  assert ''.join(pieces) == writer.generate(['the'], settings)[0].text
  with pytest.raises(errors.UserError, match='Z'):
    writer.stream('Zoo')
  assert ''.join(counting().stream('a', SHORT, transforms=[skip])) == 'cegik'


class Counted(byte.ByteTokenizer):
  """Keeps what it encodes."""

  def __init__(self):
    super().__init__()
    self.encoded = []

  def encode(self, text):
    self.encoded.append(text)
    return super().encode(text)


def test_the_longest_text_is_known_before_and_encoded_once():
  tokenizer = Counted()
  source = generator.Generator(Successor(), {}, tokenizer)
  settings = [SamplingParams(max_new_tokens=n) for n in (9, 3, 1)]
  assert source.longest(['ab', 'abcdefgh', ''], settings) == 11
  made = source.generate(['ab', 'abcdefgh', ''], settings)
  assert tokenizer.encoded == ['ab', 'abcdefgh', '']
  assert [one.text for one in made][:2] == ['cdefghijk', 'ijk']
  source.begins_document = True
  assert source.longest(['ab', 'abcdefgh', ''], settings) == 12
  assert source.longest([]) == 0
  with pytest.raises(errors.UserError, match='prompt 5 is not a text'):
    source.longest([5])


def test_equal_settings_are_written_as_they_were_given():
  source = counting()
  for temperature in (1, 1.0, 1):
    source.generate(['a'], SamplingParams(max_new_tokens=1, temperature=temperature))
    assert f'"temperature": {temperature},' in source.manifest()[0]


def test_timing(writer):
  assert counting().timing is None
  made = writer.generate(PROMPTS, dataclasses.replace(SHORT, num_samples=2), batch_size=6)
  timing = writer.timing
  assert (timing.prompts, timing.texts, timing.tokens) == (7, 14, sum(len(one.tokens) for one in made)) == (7, 14, 70)
  assert timing.tokens_per_s == pytest.approx(70 / timing.seconds)
  assert 'texts: 14, tokens: 70' in str(timing)


def test_a_bar_where_there_is_more_than_one_batch(capsys):
  for size, bar in ((2, True), (4, False)):
    assert len(counting().generate(['a', 'b', 'c'], SHORT, batch_size=size, progress=True)) == 3
    assert ('3/3' in capsys.readouterr().err) is bar
  counting().generate(['a', 'b', 'c'], SHORT, batch_size=2)
  assert capsys.readouterr().err == ''


@pytest.mark.parametrize(
  ('prompts', 'settings', 'size', 'parts'),
  [
    ('sea', SHORT, 1, ["prompts='sea'"]),
    (['sea', 'the Zoo'], SHORT, 1, ["'Z'"]),
    (['sea', 'a\udc80'], SHORT, 1, ['offset 1', 'UTF-8']),
    (['sea', 'a'], [SHORT], 1, ['1 for 2 prompts']),
    (['sea'], SHORT, 0, ['batch_size=0']),
    (['sea', 'a'], [SHORT, dataclasses.replace(SHORT, stop_tokens=(999,))], 1, ['stop_tokens', '999']),
    (['sea', 'a'], [SHORT, dataclasses.replace(SHORT, guidance=2.0, negative_prompt='Zoo')], 1, ["'Z'"]),
  ],
)
def test_wrong_input_is_seen_before_the_first_batch(writer, batches, tmp_path, prompts, settings, size, parts):
  for call in (writer.generate, lambda *args, **kwargs: writer.generate_to(tmp_path / 'out.jsonl', *args, **kwargs)):
    with pytest.raises(errors.UserError) as caught:
      call(prompts, settings, batch_size=size)
    assert all(part in str(caught.value) for part in parts)
  assert batches == []
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('torn', [b'', b'{"batch": 2, "rows": [{"prompt": "se', b'{"batch": 2}\n', b'x' * 100_000])
def test_a_stopped_file_goes_on_where_it_stood(writer, batches, tmp_path, capsys, torn):
  settings = [dataclasses.replace(SHORT, num_samples=1 + i % 2, alternatives=i % 3, seed=i) for i in range(len(PROMPTS))]
  whole, stopped = tmp_path / 'whole.jsonl', tmp_path / 'stopped.jsonl'
  expected = writer.generate_to(whole, PROMPTS, settings, batch_size=3)
  all_batches = batches.copy()
  assert len(all_batches) == 4
  assert not pathlib.Path(f'{whole}.partial').exists()
  batches.clear()
  batches.stop(2)
  with pytest.raises(KeyboardInterrupt, match='partial keeps 6 of 10 texts: asked for again, they go on from there'):
    writer.generate_to(stopped, PROMPTS, settings, batch_size=3)
  assert capsys.readouterr().err == ''
  assert not stopped.exists()
  partial = pathlib.Path(f'{stopped}.partial')
  kept = partial.read_bytes()
  partial.write_bytes(kept + torn)
  batches.clear()
  batches.stop(1)
  with pytest.raises(KeyboardInterrupt):
    writer.generate_to(stopped, PROMPTS, settings, batch_size=3)
  assert partial.read_bytes().startswith(kept)
  assert [json.loads(line).get('batch') for line in partial.read_text().splitlines()] == [None, 0, 1, 2]
  batches.stop(99)
  capsys.readouterr()
  assert writer.generate_to(stopped, PROMPTS, settings, batch_size=3) == expected
  assert f'{partial}: 8 of 10 texts are there' in capsys.readouterr().err
  assert batches == all_batches[2:]
  assert stopped.read_bytes() == whole.read_bytes()
  assert not partial.exists()
  assert writer.timing.texts == 2
  assert [json.loads(line)['prompt'] for line in whole.read_text().splitlines()] == [one.prompt for one in expected]


def test_a_killed_command_goes_on(trained, tmp_path, capsys):
  (tmp_path / 'prompts.txt').write_text('\n'.join(PROMPTS))
  flags = [f'--prompts_file={tmp_path}/prompts.txt', '--max_new_tokens=5', '--batch_size=2', '--format=jsonl']
  argv = ['sample.py', f'--workdir={trained}', *flags, f'--output={tmp_path}/killed.jsonl']
  script = f"""
import os, signal, sample
from textgen_jax.sampling import journal
append = journal.Journal.append
def appending(self, rows):
  append(self, rows)
  if self._written == 2:
    os.kill(os.getpid(), signal.SIGKILL)
journal.Journal.append = appending
sample.main({argv!r})
"""
  done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
  assert done.returncode == -signal.SIGKILL
  capsys.readouterr()
  assert sample.main(argv) == 0
  assert '4 of 7 texts are there' in capsys.readouterr().err
  assert sample.main([*argv[:-1], f'--output={tmp_path}/whole.jsonl']) == 0
  assert (tmp_path / 'killed.jsonl').read_bytes() == (tmp_path / 'whole.jsonl').read_bytes()
  assert sample.main(argv) == 2  # it exists
  assert sorted(path.name for path in tmp_path.iterdir()) == ['killed.jsonl', 'prompts.txt', 'whole.jsonl']


@pytest.mark.parametrize(
  ('flags', 'batch', 'told'),
  [
    (['--format=jsonl', '--output={}/o'], 2, 'interrupted; {}/o.partial keeps 4 of 7 texts: asked for again, they go on from there'),
    (['--format=jsonl', '--output={}/o'], 0, 'interrupted; nothing was left unsaved'),
    (['--output={}/o'], 2, 'interrupted; no text was written'),
  ],
)
def test_ctrl_c_is_told_in_one_line(trained, batches, tmp_path, capsys, flags, batch, told):
  (tmp_path / 'prompts.txt').write_text('\n'.join(PROMPTS))
  batches.stop(batch)
  argv = ['sample.py', f'--workdir={trained}', f'--prompts_file={tmp_path}/prompts.txt', '--max_new_tokens=5', '--batch_size=2']
  capsys.readouterr()
  assert sample.main([*argv, *(flag.format(tmp_path) for flag in flags)]) == 130
  out, err = capsys.readouterr()
  note, *lines = err.splitlines()
  assert 'the text may reach 41 tokens' in note
  assert (out, lines) == ('', [f'error: {told.format(tmp_path)}'])


def test_a_journal_of_another_request_is_refused(writer, batches, tmp_path):
  path, partial = tmp_path / 'out.jsonl', tmp_path / 'out.jsonl.partial'
  batches.stop(1)
  with pytest.raises(KeyboardInterrupt):
    writer.generate_to(path, PROMPTS, SHORT, batch_size=3)
  kept = partial.read_bytes()
  batches.stop(99)
  trembling = jax.tree.map(lambda x: x * 1.001, writer.params)
  other = generator.Generator(writer.model, trembling, writer.tokenizer, writer.step)
  for source, prompts, settings, size, name in [
    (writer, PROMPTS[::-1], SHORT, 3, 'prompts'),
    (writer, PROMPTS, dataclasses.replace(SHORT, seed=1), 3, 'settings'),
    (writer, PROMPTS, SHORT, 2, 'batch_size'),
    (other, PROMPTS, SHORT, 3, 'checkpoint'),
  ]:
    with pytest.raises(errors.UserError, match=f'other {name}: delete it, or name another output') as caught:
      source.generate_to(path, prompts, settings, batch_size=size)
    assert str(partial) in str(caught.value)
  with partial.open('rb') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    with pytest.raises(errors.UserError, match='another process writes it'):
      writer.generate_to(path, PROMPTS, SHORT, batch_size=3)
  assert partial.read_bytes() == kept
  assert len(batches) == 1


DAMAGED_FIELDS = [
  {'text': None},
  {'text': 5},
  {'tokens': None},
  {'tokens': [1.5]},
  {'tokens': [True]},
  {'tokens': 'abc'},
  {'seed': '1'},
  {'finish_reason': ['end']},
  {'log_probs': 'abc'},
  {'log_probs': ['a']},
  {'alternatives': [[[1]]]},
  {'alternatives': [[[1.0, -1.0]]]},
  {'alternatives': [1]},
  {'score': [1.0]},
  {'sampel_index': 1},
]


@pytest.mark.parametrize('damage', ['foreign', 'swapped', 'middle', 'rows', 'prompt', 'directory', 'pipe', *DAMAGED_FIELDS])
def test_a_damaged_journal_is_refused(writer, batches, tmp_path, damage):
  path, partial = tmp_path / 'out.jsonl', tmp_path / 'out.jsonl.partial'
  batches.stop(2)
  with pytest.raises(KeyboardInterrupt):
    writer.generate_to(path, PROMPTS, SHORT, batch_size=2)
  header, first, second = partial.read_text().splitlines(keepends=True)
  partial.unlink()
  match damage:
    case 'foreign':
      partial.write_text('some text\n')
    case 'swapped':
      partial.write_text(header + second + first)
    case 'middle':
      partial.write_text(header + first[:-9] + '\n' + second)
    case 'rows':
      partial.write_text(header + first + json.dumps({'batch': 1, 'rows': [1, 2]}) + '\n')
    case 'prompt':
      partial.write_text(header + first.replace('see a', 'see b') + second)
    case dict():
      content = json.loads(first)
      content['rows'][0] |= damage
      partial.write_text(header + json.dumps(content) + '\n' + second)
    case 'directory':
      partial.mkdir()
    case 'pipe':
      os.mkfifo(partial)
  batches.stop(99)
  with pytest.raises(errors.UserError, match='partial'):
    writer.generate_to(path, PROMPTS, SHORT, batch_size=2)
  assert len(batches) == 2
  assert not path.exists()


def test_a_journal_of_more_batches_is_refused(batches, tmp_path):
  rows = [[one.row()] for one in counting().generate(['a', 'b'], SHORT)]
  batches.stop(1)
  with pytest.raises(KeyboardInterrupt):
    counting().generate_to(tmp_path / 'out', ['a', 'b'], SHORT, batch_size=1)
  batches.stop(9)
  with (tmp_path / 'out.partial').open('a') as file:
    file.writelines(journal.line({'batch': number, 'rows': rows[1]}) for number in (1, 2))
  with pytest.raises(errors.UserError, match='has 3 batches, and 2 are to be made'):
    counting().generate_to(tmp_path / 'out', ['a', 'b'], SHORT, batch_size=1)
  assert [one.name for one in tmp_path.iterdir()] == ['out.partial']


def test_a_new_file_is_a_new_one(tmp_path):
  (tmp_path / 'there').write_text('old')
  os.symlink('nowhere', tmp_path / 'link')
  for name, part in [('there', 'exists'), ('link', 'exists'), ('', 'directory'), ('no/out', 'its directory does not exist')]:
    with pytest.raises(errors.UserError, match=part):
      journal.check_new('output', tmp_path / name)
  journal.check_new('output', tmp_path / 'new')
  assert (tmp_path / 'there').read_text() == 'old'


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
  path, other = tmp_path / 'out', tmp_path / 'out.tmp'
  other.write_text("the user's own")

  def lines(then):
    yield 'new\n'
    then()

  def stop():
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    journal.write_new('output', path, lines(stop))
  assert list(tmp_path.iterdir()) == [other]
  with pytest.raises(errors.UserError, match='exists: name a new file'):
    journal.write_new('output', path, lines(lambda: path.write_text('of another process')))
  assert path.read_text() == 'of another process'
  path.unlink()
  journal.write_new('output', path, lines(lambda: journal.write_new('manifest', tmp_path / 'm', lines(lambda: None))))
  assert (path.read_text(), (tmp_path / 'm').read_text(), other.read_text()) == ('new\n', 'new\n', "the user's own")
  assert path.stat().st_mode == other.stat().st_mode
  assert sorted(one.name for one in tmp_path.iterdir()) == ['m', 'out', 'out.tmp']


def test_a_file_system_without_links(tmp_path, monkeypatch):
  def link(old, new):
    raise PermissionError(errno.EPERM, 'Operation not permitted')

  monkeypatch.setattr(os, 'link', link)
  journal.write_new('output', tmp_path / 'out', ['new\n'])
  with pytest.raises(errors.UserError, match='exists'):
    journal.write_new('output', tmp_path / 'out', ['newer\n'])
  assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [('out', 'new\n')]


def test_a_disk_that_fails_leaves_nothing(tmp_path, monkeypatch):
  def fsync(file):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', fsync)
  with pytest.raises(errors.MachineFailed, match=r'output=.*out.*No space left'):
    journal.write_new('output', tmp_path / 'out', ['new\n'])
  with pytest.raises(errors.MachineFailed, match='partial'):
    journal.Journal(tmp_path / 'out', {})
  assert list(tmp_path.iterdir()) == []


def test_a_lock_is_on_the_file_that_is_there(tmp_path, monkeypatch):
  """The last owner ends, and takes its file away, between our opening and locking it."""
  path, real, locked = tmp_path / 'out.partial', fcntl.flock, []

  def flock(file, how):
    locked.append(file)
    if len(locked) < 3:
      path.unlink()
    if len(locked) == 2:
      path.touch()  # that of a third process, which ends too
    real(file, how)

  monkeypatch.setattr(fcntl, 'flock', flock)
  with journal.Journal(tmp_path / 'out', {'a': 1}) as kept:
    assert len(locked) == 3
    with pytest.raises(errors.UserError, match='another process writes it'):
      journal.Journal(tmp_path / 'out', {'a': 1})
    kept.append(['text'])
  assert len(path.read_text().splitlines()) == 2


def test_a_journal_takes_away_its_own_file_alone(tmp_path):
  path = tmp_path / 'out.partial'
  (tmp_path / 'out').write_text('of a process that ended meanwhile')
  with pytest.raises(errors.UserError, match='exists'):
    journal.Journal(tmp_path / 'out', {})
  assert [one.name for one in tmp_path.iterdir()] == ['out']
  for others in (None, 'of another process'):
    (tmp_path / 'out').unlink()
    with journal.Journal(tmp_path / 'out', {}) as kept:
      kept.append(['text'])
      path.unlink()
      if others:
        path.write_text(others)
      kept.finish(['text\n'])
    assert (tmp_path / 'out').read_text() == 'text\n'
    assert (path.read_text() if path.exists() else None) == others


def test_prompts_of_stdin(trained, tmp_path, monkeypatch, capsys):
  def run(data):
    (tmp_path / 'stdin').write_bytes(data)
    with open(tmp_path / 'stdin') as file:
      monkeypatch.setattr(sys, 'stdin', file)
      code = sample.main(['sample.py', f'--workdir={trained}', '--prompts_file=-', '--max_new_tokens=0'])
    return code, *capsys.readouterr()

  capsys.readouterr()
  assert run(b'the king\r\nsea\n')[:2] == (0, 'the king\n---\nsea\n')
  for data, part in [(b'', 'holds no prompt'), (b'a\xff\n', 'byte 1'), (b'the Zoo\n', "'Z'")]:
    code, out, err = run(data)
    assert (code, out, len(err.splitlines())) == (2, '', 1)
    assert part in err


def test_a_draft_and_beams_go_through_it(trained, writer, tmp_path, capsys):
  drafted = generator.Generator.load(trained, draft=trained, draft_tokens=3)
  assert drafted.generate(PROMPTS, SHORT, batch_size=3) == writer.generate(PROMPTS, SHORT)
  assert ''.join(drafted.stream('sea', SHORT)) == ''.join(writer.stream('sea', SHORT))
  beams = SamplingParams(max_new_tokens=5, num_beams=3, num_samples=2)
  found = writer.generate(PROMPTS, [SHORT, beams] * 3 + [SHORT], batch_size=3)
  assert [one.prompt for one in found if one.score is not None] == [prompt for prompt in PROMPTS[1::2] for _ in range(2)]
  capsys.readouterr()
  flags = ['--max_new_tokens=5', '--num_beams=3', '--num_samples=2', '--format=jsonl', '--prompt=a']
  assert sample.main(['sample.py', f'--workdir={trained}', *flags]) == 0
  rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [row['text'] for row in rows] == [one.text for one in writer.generate(['a'], beams)]
  assert rows[0]['score'] >= rows[1]['score']


def test_a_manifest_names_its_draft(trained, tmp_path, capsys):
  flags = ['--max_new_tokens=9', '--log_probs', f'--draft={trained}', f'--manifest={tmp_path}/m.jsonl']
  assert sample.main(['sample.py', f'--workdir={trained}', *flags]) == 0
  again = ['sample.py', f'--workdir={trained}', f'--reproduce={tmp_path}/m.jsonl']
  assert sample.main([*again, f'--draft={trained}', f'--output={tmp_path}/again.jsonl']) == 0
  assert (tmp_path / 'again.jsonl').read_bytes() == (tmp_path / 'm.jsonl').read_bytes()
  capsys.readouterr()
  assert sample.main(again) == 2
  assert 'was written with draft=' in capsys.readouterr().err


def test_a_draft_of_another_tokenizer_is_refused(trained, writer, tmp_path, monkeypatch):
  real = generator.workdir_lib.load

  def load(path, checkpoint='best'):
    found = real(trained, checkpoint)
    return dataclasses.replace(found, tokenizer=byte.ByteTokenizer()) if path == 'other' else found

  monkeypatch.setattr(generator.workdir_lib, 'load', load)
  with pytest.raises(errors.UserError, match="draft='other': its tokenizer isn't the one of"):
    generator.Generator.load(trained, draft='other')


def test_prompts_begin_documents_where_the_model_was_trained_so(writer):
  apart = generator.Generator(writer.model, writer.params, writer.tokenizer, begins_document=True)
  said = dataclasses.replace(SHORT, begins_document=True)
  assert apart.generate(PROMPTS, SHORT) == writer.generate(PROMPTS, said) != writer.generate(PROMPTS, SHORT)
  assert ''.join(apart.stream('sea', SHORT)) == writer.generate(['sea'], said)[0].text
  apart.generate(['sea'], SHORT)
  assert json.loads(apart.manifest()[0])['settings'][0]['begins_document']
