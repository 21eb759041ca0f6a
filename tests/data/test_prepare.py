import dataclasses
import errno
import io
import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from textgen_jax import errors
from textgen_jax.data import corpora, documents, encode, files, prepare, tokens
from textgen_jax.text import base, build

ROOT = pathlib.Path(__file__).parents[2]
CHAR, BYTE = base.TokenizerConfig(), base.TokenizerConfig(kind='byte')
KINDS = {
  'char': CHAR,
  'unknown': base.TokenizerConfig(unknown_symbol='?'),
  'byte': BYTE,
  'word': base.TokenizerConfig(kind='word', coverage=0.9),
  'sentencepiece': base.TokenizerConfig(kind='sentencepiece', vocab_size=350),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('TEXTGEN_JAX_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache'


def write(folder, **texts):
  folder.mkdir(exist_ok=True)
  for name, text in texts.items():
    (folder / name).write_bytes(text.encode())
  return corpora.DataConfig(path=str(folder), val_fraction=0.3)


def story(seed, characters):
  """Lines of words, some with wide characters, quotes and runs of spaces; no line of it is as long as the words of others."""
  generator = random.Random(seed)
  words = 'the king "and" his fool, who\u2019d gone (over hill) - caf\u00e9 \u4e16\u754c \U0001f600 x1 -- end.'.split()
  pieces = []
  while sum(map(len, pieces)) < characters:
    pieces.append(generator.choice(words) + generator.choice([' ', ' ', ' ', ' ', '\n', '\n', '  ', '\t', '\n\n']))
  return ''.join(pieces)[:characters]


def whole(split):
  """A split's tokens, records and marks as plain lists."""
  marks = None if split.is_reply is None else split.is_reply.tolist()
  return split.tokens.tolist(), split.documents.tolist(), split.ranges, marks


def by_hand(tokenizer, texts):
  """Ids and records of documents that are encoded whole."""
  end, ids, records = tokenizer.special_ids['end_of_text'], [], []
  for text in texts:
    encoded, spelled = tokenizer.encode(text).tolist(), tokenizer.unknowns(text)
    assert encoded.count(tokenizer.special_ids.get('unknown', -1)) == len(spelled)
    measures = len(text.encode()), len(text), len(text.split()), len(spelled), sum(len(one.encode()) for one in spelled)
    records.append((len(ids), len(encoded) + 1, *measures))
    ids += [end, *encoded]
  return [*ids, end], records


def contents(directory):
  return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob('*') if path.is_file()}


def left(cache):
  return sorted(path.suffix for path in (cache / 'prepared').iterdir())


def test_documents_follow_end_of_text_and_are_measured(tmp_path):
  data = write(tmp_path / 'text', a='ab\u00e9', b='b b\n', c='ba', d='a')
  prepared = prepare.prepare(data, CHAR)  # 10 characters: val is c and d
  train, val = prepared.splits['train'], prepared.splits['val']
  assert prepared.tokenizer.special_ids == {'end_of_text': 5}  # '\n', ' ', 'a', 'b', U+E9
  assert train.tokens.tolist() == [5, 2, 3, 4, 5, 3, 1, 3, 0, 5]
  assert val.tokens.tolist() == [5, 3, 2, 5, 2, 5]
  assert train.documents.tolist() == [(0, 4, 4, 3, 1, 0, 0), (4, 5, 4, 4, 2, 0, 0)]
  assert val.documents.tolist() == [(0, 3, 2, 2, 1, 0, 0), (3, 2, 1, 1, 1, 0, 0)]
  assert (train.ranges, val.ranges) == (((0, 10, 1.0),), ((0, 6, 1.0),))
  assert train.is_reply is None
  assert prepared.names('train') == ['a', 'b']
  assert prepared.tokenizer.decode(train.tokens) == 'ab\u00e9b b\n'
  about = prepared.description['splits']['train']
  assert {name: about[name] for name in ('tokens', 'dtype', 'documents', 'ranges')} == {
    'tokens': 10, 'dtype': 'uint16', 'documents': 2, 'ranges': [[0, 10, 1.0]],
  }  # fmt: skip
  assert set(about['sha256']) == {'bin', 'documents', 'names'}
  assert json.loads((prepared.directory / 'description.json').read_text()) == prepared.description
  assert prepared.description['tokenizer'] == prepared.tokenizer.fingerprint()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(('job_characters', 'parallel'), [(17, 0), (1, 1 << 24), (1 << 20, 1 << 24)])
def test_pieces_and_processes_give_the_ids_of_whole_documents(tmp_path, monkeypatch, kind, job_characters, parallel):
  monkeypatch.setattr(encode, 'JOB_CHARACTERS', job_characters)
  monkeypatch.setattr(prepare, 'PARALLEL_CHARACTERS', parallel)
  texts = [story(1, 3000), 'no line ' * 20, story(2, 200), 'x\n', story(3, 600) + '\n\n'] + [story(seed, 150) for seed in range(4, 12)]
  if kind == 'unknown':
    texts[-1] = 'q\u0416Z' + texts[-1]  # not in train
  data = write(tmp_path / 'text', **{f'{index:02}': text for index, text in enumerate(texts)})
  prepared = prepare.prepare(data, KINDS[kind])
  held_out = len(prepared.names('val'))
  assert 1 <= held_out < len(texts)
  for split, part in (('train', slice(0, -held_out)), ('val', slice(-held_out, None))):
    found, (ids, records) = prepared.splits[split], by_hand(prepared.tokenizer, texts[part])
    assert found.tokens.tolist() == ids
    assert found.documents.tolist() == records
    assert found.ranges == (tokens.Range(0, len(ids), 1.0),)
    assert prepared.names(split) == [f'{index:02}' for index in range(len(texts))[part]]
  if kind in ('unknown', 'word'):
    assert prepared.splits['val'].documents['unknowns'].any()


def test_a_word_that_cuts_go_through_is_one(tmp_path, monkeypatch):
  monkeypatch.setattr(prepare, 'PARALLEL_CHARACTERS', 0)
  for size in range(1, 9):
    monkeypatch.setattr(encode, 'JOB_CHARACTERS', size)
    texts = ['abcdefgh', ' ab  cd ', 'a b\u2003c\n', 'i', 'yz yz', '  ', 'ends', 'begins ends']
    prepared = prepare.prepare(write(tmp_path / 'text', **dict(zip('abcdefgh', texts, strict=True)), i='a' * (8 + size)), CHAR)
    assert [words for split in ('train', 'val') for words in prepared.splits[split].documents['words']] == [1, 2, 3, 1, 2, 0, 1, 2, 1]


def test_smallest_type_that_holds_the_vocabulary(tmp_path):
  for size, dtype in [(65_535, np.uint16), (65_536, np.uint32), (70_000, np.uint32)]:  # and the end of a text
    text = ''.join(chr(0x10000 + index) for index in range(size))
    split = prepare.prepare(write(tmp_path / f'{size}', a=text, b=text), CHAR).splits['val']
    assert split.tokens.dtype == dtype
    assert split.tokens.tolist() == [size, *range(size), size]


def test_second_call_reads_no_document_and_writes_nothing(tmp_path, monkeypatch):
  data = write(tmp_path / 'text', a='ab\nabababa')
  first = prepare.prepare(data, CHAR)
  stamps = {path: path.stat().st_mtime_ns for path in first.directory.rglob('*')}
  monkeypatch.setattr(prepare, '_write', None)
  again = prepare.prepare(data, CHAR)
  assert {path: path.stat().st_mtime_ns for path in again.directory.rglob('*')} == stamps
  assert (again.fingerprint, again.description) == (first.fingerprint, first.description)
  assert {split: whole(found) for split, found in again.splits.items()} == {split: whole(found) for split, found in first.splits.items()}


def test_whatever_decides_the_tokens_decides_the_directory(tmp_path):
  data = write(tmp_path / 'text', a='abcabcabcabc')
  text = tmp_path / 'text' / 'a'
  cases = [
    (data, CHAR),
    (data, BYTE),
    (data, base.TokenizerConfig(unknown_symbol='?')),
    (dataclasses.replace(data, val_fraction=0.5), CHAR),
    (dataclasses.replace(data, loss_on_replies=True), CHAR),
    (write(tmp_path / 'other', a='abcabcabcacb'), CHAR),
    (dataclasses.replace(data, mixture=f'{text}:1,{tmp_path}/other/a:1'), CHAR),
    (dataclasses.replace(data, mixture=f'{text}:1,{tmp_path}/other/a:2'), CHAR),
    (dataclasses.replace(data, mixture=f'{tmp_path}/other/a:1,{text}:1'), CHAR),
  ]
  prepared = [prepare.prepare(*case) for case in cases]
  assert len({one.directory for one in prepared}) == len({one.fingerprint for one in prepared}) == len(cases)
  moved = prepare.prepare(write(tmp_path / 'moved', a='abcabcabcabc'), CHAR)
  assert (moved.directory, moved.fingerprint) == (prepared[0].directory, prepared[0].fingerprint)
  assert moved.description['corpus'] == str(tmp_path / 'moved')


def test_a_models_content_decides_not_its_place(tmp_path):
  data = write(tmp_path / 'text', a=story(0, 2000))
  for name, seed, size in (('a', 1, 350), ('b', 2, 340)):
    trained = build.train(dataclasses.replace(KINDS['sentencepiece'], vocab_size=size), [story(seed, 3000)])
    (tmp_path / f'{name}.model').write_bytes(trained._model)
  (tmp_path / 'moved.model').write_bytes((tmp_path / 'a.model').read_bytes())
  configs = {name: base.TokenizerConfig(kind='sentencepiece', model_path=str(tmp_path / f'{name}.model')) for name in ('a', 'b', 'moved')}
  prepared = {name: prepare.prepare(data, config) for name, config in configs.items()}
  assert prepared['a'].directory == prepared['moved'].directory
  assert prepared['a'].directory != prepared['b'].directory
  assert (prepared['a'].tokenizer.vocab_size, prepared['b'].tokenizer.vocab_size) == (350, 340)
  (tmp_path / 'a.model').write_bytes((tmp_path / 'b.model').read_bytes())
  assert prepare.prepare(data, configs['a']).directory == prepared['b'].directory
  (tmp_path / 'a.model').unlink()
  with pytest.raises(errors.UserError, match=r"tokenizer\.model_path='?.*/a\.model'? can't be read"):
    prepare.prepare(data, configs['a'])


def test_a_mixture_is_ranges_with_weights(tmp_path, monkeypatch):
  monkeypatch.setattr(encode, 'JOB_CHARACTERS', 3)
  (tmp_path / 'a').write_text('abcdefghij')
  (tmp_path / 'b.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in ('jih', 'gf', 'e')))
  data = corpora.DataConfig(mixture=f'{tmp_path}/a:3,{tmp_path}/b.jsonl:1', val_fraction=0.2)
  prepared = prepare.prepare(data, CHAR)
  train, val = prepared.splits['train'], prepared.splits['val']
  assert prepared.tokenizer.vocab_size == 11  # 'i' and 'j' of the first are held out, but the second has them in train
  end = prepared.tokenizer.special_ids['end_of_text']
  assert train.tokens.tolist() == [end, *range(8), end, 9, 8, 7, end]
  assert train.ranges == ((0, 10, 0.75), (9, 14, 0.25))
  assert val.tokens.tolist() == [end, 8, 9, end, 6, 5, end, 4, end]
  assert val.ranges == ((0, 4, 0.75), (3, 9, 0.25))
  assert prepared.names('train') == [f'{tmp_path}/a/a', f'{tmp_path}/b.jsonl/b.jsonl:1']
  assert prepared.names('val') == [f'{tmp_path}/a/a'] + [f'{tmp_path}/b.jsonl/b.jsonl:{line}' for line in (2, 3)]
  assert [record[:2] for record in val.documents.tolist()] == [(0, 3), (3, 3), (6, 2)]
  for split in (train, val):
    assert all(split.tokens[part.start] == split.tokens[part.stop - 1] == end for part in split.ranges)


def fake(name, splits):
  """A source whose documents are lists of parts by split."""

  def read(split):
    for place, parts in enumerate(splits[split]):
      yield documents.Document(f'{split}{place}', [documents.Part(*part) for part in parts])

  return corpora.Source('', '', '', '', lambda: documents.Corpus(name, f'{name}:{splits}', tuple(splits), read))


def test_a_split_that_only_one_of_a_mixture_has_is_all_its_own(monkeypatch):
  one, two = {'train': [[('ab',)]], 'val': [[('a',)]]}, {'train': [[('ba',)]], 'val': [[('b',)]], 'test': [[('aab',)]]}
  monkeypatch.setattr(corpora, 'CORPORA', {'one': fake('one', one), 'two': fake('two', two)})
  for mixture, val in (('one:3,two:1', [2, 0, 2, 1, 2]), ('two:1,one:3', [2, 1, 2, 0, 2])):
    prepared = prepare.prepare(corpora.DataConfig(mixture=mixture), CHAR)
    assert list(prepared.splits) == ['train', 'val', 'test']
    assert prepared.splits['val'].tokens.tolist() == val
    assert {part.weight for part in prepared.splits['val'].ranges} == {0.75, 0.25}
    assert prepared.splits['test'].tokens.tolist() == [2, 0, 0, 1, 2]
    assert prepared.splits['test'].ranges == ((0, 5, 1.0),)
    assert prepared.names('test') == ['two/test0']


REPLIES = {
  'train': [
    [('ask\n', False), ('Answer two words\n', True), ('and?\n', False), ('\u4e16 yes\n', True)],
    [('only asked\n', False)],
    [('only', True), (' said', True)],
    [('said\n', True), ('left\n', False), ('open\n', False)],
    [('a\n', False), ('b', True)],
  ],
  'val': [[('a\n', False), ('s e\n', True)], [('a', False)]],
}


@pytest.mark.parametrize('job_characters', [1, 3, 1 << 20])
@pytest.mark.parametrize('kind', ['char', 'byte', 'word'])
def test_replies_are_marked_and_alone_measured(monkeypatch, kind, job_characters):
  monkeypatch.setattr(encode, 'JOB_CHARACTERS', job_characters)
  monkeypatch.setattr(corpora, 'CORPORA', {'talk': fake('talk', REPLIES)})
  data = corpora.DataConfig(corpus='talk', loss_on_replies=True)
  prepared, plain = prepare.prepare(data, KINDS[kind]), prepare.prepare(corpora.DataConfig(corpus='talk'), KINDS[kind])
  for split, parts in REPLIES.items():
    ids, marks, records = [], [], []
    for document in parts:
      ids.append(prepared.tokenizer.special_ids['end_of_text'])
      start = len(ids) - 1
      marks.append(bool(records) and parts[len(records) - 1][-1][1])  # it closes the document before
      for is_reply, group in itertools.groupby(document, key=lambda part: part[1]):  # what isn't set apart is encoded together
        encoded = prepared.tokenizer.encode(''.join(text for text, _ in group)).tolist()
        ids += encoded
        marks += [is_reply] * len(encoded)
      said = [text for text, is_reply in document if is_reply]
      unknown = [one for text in said for one in prepared.tokenizer.unknowns(text)]
      text = ''.join(said)
      measures = len(text.encode()), len(text), len(text.split()), len(unknown), len(''.join(unknown).encode())
      records.append((start, sum(marks[start + 1 :]) + document[-1][1], *measures))
    ids.append(prepared.tokenizer.special_ids['end_of_text'])
    marks.append(parts[-1][-1][1])
    assert whole(prepared.splits[split]) == (ids, records, (tokens.Range(0, len(ids), 1.0),), marks)
    assert sum(marks) == sum(record[1] for record in records)
    assert plain.splits[split].tokens.tolist() == ids
    assert plain.splits[split].is_reply is None
  assert prepared.splits['train'].documents['tokens'][1] == 0


DAMAGE = ['cut', 'gone', 'empty', 'flipped', 'longer']
FILES = [f'{split}.{suffix}' for split in ('train', 'val') for suffix in ('bin', 'documents', 'names')]


@pytest.mark.parametrize('name', [*FILES, 'description.json', 'tokenizer/tokenizer.json'])
@pytest.mark.parametrize('damage', DAMAGE)
def test_damaged_files_are_prepared_anew(tmp_path, name, damage):
  data = write(tmp_path / 'text', a='ab\nabababa')
  first = prepare.prepare(data, CHAR)
  path, good, splits = first.directory / name, contents(first.directory), {split: whole(found) for split, found in first.splits.items()}
  if damage == 'gone':
    path.unlink()
  else:
    middle = len(good[name]) // 2
    flipped = good[name][:middle] + bytes([good[name][middle] ^ 1]) + good[name][middle + 1 :]
    path.write_bytes({'cut': good[name][:-2], 'empty': b'', 'flipped': flipped, 'longer': good[name] + b'\0'}[damage])
  again = prepare.prepare(data, CHAR)
  assert again.fingerprint == first.fingerprint
  assert {split: whole(found) for split, found in again.splits.items()} == splits
  assert contents(first.directory) == good or name == 'description.json'


def test_a_damaged_description_is_not_believed(tmp_path):
  (tmp_path / 'a').write_text('abcdefghij')
  (tmp_path / 'b').write_text('jihgfedcba')
  data = corpora.DataConfig(mixture=f'{tmp_path}/a:3,{tmp_path}/b:1', val_fraction=0.2)
  first = prepare.prepare(data, base.TokenizerConfig(unknown_symbol='?'))
  splits = {split: whole(found) for split, found in first.splits.items()}
  path, good = first.directory / 'description.json', (first.directory / 'description.json').read_text()
  start = good.index('"splits"')
  for place in range(start, len(good), 3):
    wrong = str((int(good[place]) + 1) % 10) if good[place].isdigit() else chr(ord(good[place]) ^ 1)
    path.write_text(good[:place] + wrong + good[place + 1 :])
    again = prepare.prepare(data, base.TokenizerConfig(unknown_symbol='?'))
    assert {split: whole(found) for split, found in again.splits.items()} == splits, good[place - 30 : place + 1]
    assert again.fingerprint == first.fingerprint
    path.write_text(good)


STOPPED = {
  'a': 'one two three\nfour five six\nseven\neight nine\nten\neight',
  'b': 'eight nine ten\n' * 2,
  'c': 'one six\nten\n' * 2,
  'd': 'ten nine four',
}


class Stop:
  """Encodes, and then stops; remembers what it was asked for."""

  def __init__(self, after):
    self.after, self.seen, self._encode = after, [], encode.encode

  def __call__(self, tokenizer, piece):
    if len(self.seen) == self.after:
      raise KeyboardInterrupt
    self.seen.append((piece.document, piece.offset))
    return self._encode(tokenizer, piece)


def small_jobs(monkeypatch):
  monkeypatch.setattr(files, 'BLOCK_BYTES', 8)
  monkeypatch.setattr(encode, 'JOB_CHARACTERS', 7)
  monkeypatch.setattr(prepare, 'JOURNAL_JOBS', 2)


def uninterrupted(tmp_path, monkeypatch, data, tokenizer):
  with monkeypatch.context() as patch:
    patch.setenv('TEXTGEN_JAX_CACHE', str(tmp_path / 'uninterrupted'))
    counter = Stop(-1)
    patch.setattr(encode, 'encode', counter)
    return contents(prepare.prepare(data, tokenizer).directory), counter.seen


def no_training(*_):
  raise AssertionError('trained again')


@pytest.mark.parametrize('mixture', [False, True])
@pytest.mark.parametrize('kind', ['char', 'word'])
def test_what_was_stopped_goes_on(tmp_path, monkeypatch, cache, kind, mixture):
  small_jobs(monkeypatch)
  data = write(tmp_path / 'text', **STOPPED)
  if mixture:
    other = write(tmp_path / 'other', **{name: text[::-1] for name, text in STOPPED.items()})
    data = corpora.DataConfig(mixture=f'{data.path}:1,{other.path}:1', val_fraction=0.3)
  expected, every = uninterrupted(tmp_path, monkeypatch, data, KINDS[kind])
  assert len(every) > 10
  for after in range(len(every)):
    stop = Stop(after)
    with monkeypatch.context() as patch:
      patch.setattr(encode, 'encode', stop)
      with pytest.raises(KeyboardInterrupt):
        prepare.prepare(data, KINDS[kind])
    assert left(cache) == ['.lock', '.partial']
    (partial,) = (cache / 'prepared').glob('*.partial')
    noted = json.loads((partial / 'journal.json').read_text())['splits']
    go_on = Stop(-1)
    with monkeypatch.context() as patch:
      patch.setattr(encode, 'encode', go_on)
      patch.setattr(build, 'train', no_training)
      prepared = prepare.prepare(data, KINDS[kind])
    assert left(cache) == ['', '.lock']
    assert contents(prepared.directory) == expected
    again = len(stop.seen) + len(go_on.seen) - len(every)  # encoded by both
    assert go_on.seen == every[after - again :]
    assert 0 <= again < 8  # the jobs of one note, of which one here has up to 4 pieces
    assert after < 8 or noted
    prepared.directory.rename(tmp_path / f'done{after}')


def test_the_pieces_of_a_note_are_encoded_once(tmp_path, monkeypatch, cache):
  small_jobs(monkeypatch)
  data = write(tmp_path / 'text', a='abcdefg' * 10, b='g' * 7)  # 10 jobs, then 1
  stop, go_on = Stop(5), Stop(-1)
  monkeypatch.setattr(encode, 'encode', stop)
  with pytest.raises(KeyboardInterrupt):
    prepare.prepare(data, CHAR)
  monkeypatch.setattr(encode, 'encode', go_on)
  prepare.prepare(data, CHAR)
  assert [offset // 7 for _, offset in stop.seen] == [0, 1, 2, 3, 4]
  assert [offset // 7 for _, offset in go_on.seen] == [4, 5, 6, 7, 8, 9, 0]


def test_it_goes_on_from_any_later_step_too(tmp_path, monkeypatch):
  small_jobs(monkeypatch)
  data = write(tmp_path / 'text', **STOPPED)
  expected, _ = uninterrupted(tmp_path, monkeypatch, data, CHAR)

  def stopping(real, name):
    def stop(path, *args, **kwargs):
      if name in (path.name, path.suffix):
        raise KeyboardInterrupt
      return real(path, *args, **kwargs)

    return stop

  for place, name in (('write_text', 'description.json'), ('rename', '.partial')):
    with monkeypatch.context() as patch:
      patch.setattr(pathlib.Path, place, stopping(getattr(pathlib.Path, place), name))
      with pytest.raises(KeyboardInterrupt):
        prepare.prepare(data, CHAR)
    prepared = prepare.prepare(data, CHAR)
    assert contents(prepared.directory) == expected
    prepared.directory.rename(tmp_path / place)


def python(code, *argv):
  """Runs `code` in a session of its own."""
  command = [sys.executable, '-c', code, *map(str, argv)]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, start_new_session=True)


KILLED = """
import os, signal, sys
from textgen_jax.data import corpora, encode, prepare
from textgen_jax.text import base
encode.JOB_CHARACTERS, prepare.JOURNAL_JOBS, prepare.PARALLEL_CHARACTERS = 7, 2, int(sys.argv[3])
write, jobs = prepare._SplitWriter.write, []
def killed(*args):
  write(*args)
  jobs.append(args)
  if len(jobs) == int(sys.argv[2]):
    print(os.getpid(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
prepare._SplitWriter.write = killed
prepare.prepare(corpora.DataConfig(path=sys.argv[1], val_fraction=0.3), base.TokenizerConfig())
"""


def in_session(leader):
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*/stat'):
    try:
      state, _, _, session = path.read_text().rpartition(')')[2].split()[:4]
    except OSError:  # it ended meanwhile
      continue
    if int(session) == leader and state != 'Z':
      found.append(path.parent.name)
  return found


@pytest.mark.parametrize('parallel_characters', [0, 1 << 24])
def test_a_killed_process_is_gone_on_with(tmp_path, monkeypatch, cache, parallel_characters):
  small_jobs(monkeypatch)
  data = write(tmp_path / 'text', **STOPPED)
  expected, every = uninterrupted(tmp_path, monkeypatch, data, CHAR)
  done = python(KILLED, data.path, 5, parallel_characters)
  assert done.returncode == -signal.SIGKILL, done.stderr
  until = time.monotonic() + 20
  while in_session(int(done.stdout)) and time.monotonic() < until:
    time.sleep(0.05)
  assert in_session(int(done.stdout)) == []  # workers end with the one they work for
  assert left(cache) == ['.lock', '.partial']
  go_on = Stop(-1)
  monkeypatch.setattr(encode, 'encode', go_on)
  monkeypatch.setattr(build, 'train', no_training)
  assert contents(prepare.prepare(data, CHAR).directory) == expected
  assert len(go_on.seen) < len(every)
  assert go_on.seen == every[-len(go_on.seen) :]


DAMAGED_JOURNALS = {
  'empty': lambda stored: '',
  'cut': lambda stored: json.dumps(stored)[:-9],
  'list': lambda stored: '[]',
  'no splits': lambda stored: json.dumps({'tokenizer': stored['tokenizer']}),
  "another tokenizer's": lambda stored: json.dumps(stored | {'tokenizer': '0' * 64}),
  'wrong splits': lambda stored: json.dumps(stored | {'splits': {'train': {}}}),
}


@pytest.mark.parametrize('damage', DAMAGED_JOURNALS)
def test_a_damaged_journal_starts_anew(tmp_path, monkeypatch, cache, damage):
  small_jobs(monkeypatch)
  data = write(tmp_path / 'text', **STOPPED)
  expected, every = uninterrupted(tmp_path, monkeypatch, data, CHAR)
  with monkeypatch.context() as patch:
    patch.setattr(encode, 'encode', Stop(9))
    with pytest.raises(KeyboardInterrupt):
      prepare.prepare(data, CHAR)
  (partial,) = (cache / 'prepared').glob('*.partial')
  journal = partial / 'journal.json'
  journal.write_text(DAMAGED_JOURNALS[damage](json.loads(journal.read_text())))
  go_on = Stop(-1)
  monkeypatch.setattr(encode, 'encode', go_on)
  assert contents(prepare.prepare(data, CHAR).directory) == expected
  assert go_on.seen == every


@pytest.mark.parametrize('name', ['train.bin', 'train.documents', 'train.names', 'tokenizer/tokenizer.json'])
def test_a_journal_of_files_that_lost_their_end_starts_anew(tmp_path, monkeypatch, cache, name):
  """As after a power failure, which may keep the small file's end and lose the large one's."""
  small_jobs(monkeypatch)
  data = write(tmp_path / 'text', **STOPPED)
  expected, every = uninterrupted(tmp_path, monkeypatch, data, CHAR)
  with monkeypatch.context() as patch:
    patch.setattr(encode, 'encode', Stop(len(every) - 1))
    with pytest.raises(KeyboardInterrupt):
      prepare.prepare(data, CHAR)
  (partial,) = (cache / 'prepared').glob('*.partial')
  content = (partial / name).read_bytes()
  (partial / name).write_bytes(content[: len(content) // 2])
  assert contents(prepare.prepare(data, CHAR).directory) == expected


def test_what_a_dead_process_left_is_in_no_ones_way(tmp_path):
  data = write(tmp_path / 'text', a='ab\nabababa')
  first = prepare.prepare(data, CHAR)
  good = contents(first.directory)
  partial = first.directory.with_suffix('.partial')
  first.directory.rename(partial)
  (partial / 'train.bin').write_bytes(b'junk' * 1000)
  (partial / 'train.names').unlink()
  again = prepare.prepare(data, CHAR)
  assert again.fingerprint == first.fingerprint
  assert contents(again.directory) == good
  assert not partial.exists()


@pytest.mark.parametrize('parallel_characters', [0, 1 << 24])
def test_unknown_character_names_split_document_and_place(tmp_path, monkeypatch, cache, parallel_characters):
  monkeypatch.setattr(prepare, 'PARALLEL_CHARACTERS', parallel_characters)
  monkeypatch.setattr(encode, 'JOB_CHARACTERS', 4)
  data = write(tmp_path / 'text', a='abc' * 6, b='abcababz')
  message = r"split val, document b: character 'z' at offset 3 .*unknown_symbol.* \(counted from its character 4\)"
  with pytest.raises(errors.UserError, match=message):
    prepare.prepare(data, CHAR)
  assert left(cache) == ['.lock']
  prepared = prepare.prepare(data, base.TokenizerConfig(unknown_symbol='?'))
  assert prepared.splits['val'].tokens.tolist() == [4, 0, 1, 2, 0, 1, 0, 1, prepared.tokenizer.special_ids['unknown'], 4]
  assert prepared.splits['val'].documents.tolist() == [(0, 9, 8, 8, 1, 1, 1)]


def test_wrong_configuration_is_refused_before_any_text_is_read(tmp_path):
  with pytest.raises(errors.UserError, match=r'tokenizer\.kind'):
    prepare.prepare(corpora.DataConfig(path=str(tmp_path / 'missing')), base.TokenizerConfig(kind='bite'))


def test_cache_that_cannot_be_written_is_a_machine_fault(tmp_path, monkeypatch):
  data = write(tmp_path / 'text', a='ab\nabababa')
  monkeypatch.setenv('TEXTGEN_JAX_CACHE', str(tmp_path / 'text' / 'a'))
  with pytest.raises(errors.MachineFailed, match='TEXTGEN_JAX_CACHE'):
    prepare.prepare(data, CHAR)


class FullDisk(io.FileIO):
  def write(self, data):
    if self.tell() + len(data) > 4:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return super().write(data)


@pytest.mark.parametrize('name', FILES)
def test_a_full_disk_is_a_machine_fault_and_nothing_stays(tmp_path, monkeypatch, cache, name):
  data = write(tmp_path / 'text', **{f'{index:02}': 'ab' * 40 for index in range(9)})
  real = open

  def open_there(path, mode, **more):
    return io.BufferedWriter(FullDisk(path, mode)) if path.name == name else real(path, mode, **more)

  monkeypatch.setattr(prepare, 'open', open_there, raising=False)
  with pytest.raises(errors.MachineFailed, match=r"can't write .*: No space left on device; TEXTGEN_JAX_CACHE sets another place"):
    prepare.prepare(data, CHAR)
  assert left(cache) == ['.lock']
  monkeypatch.undo()
  monkeypatch.setenv('TEXTGEN_JAX_CACHE', str(cache))
  assert prepare.prepare(data, CHAR).splits['train'].documents['characters'].sum() == 6 * 80


LIMITED = """
import resource, sys
from textgen_jax import errors
from textgen_jax.data import corpora, prepare
from textgen_jax.text import base
prepare.PARALLEL_CHARACTERS = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
  prepare.prepare(corpora.DataConfig(path=sys.argv[1]), base.TokenizerConfig())
except errors.RunError as error:
  print(error)
  sys.exit(error.exit_code)
"""


@pytest.mark.parametrize('parallel_characters', [0, 1 << 24])
def test_a_real_write_that_fails_is_a_machine_fault(tmp_path, cache, parallel_characters):
  data = write(tmp_path / 'text', a='ab\n' * 20_000)
  done = python(LIMITED, data.path, parallel_characters)
  assert done.returncode == 5, done.stderr
  assert "can't write" in done.stdout
  assert 'File too large' in done.stdout
  assert 'Traceback' not in done.stderr
  assert left(cache) == ['.lock']


MEMORY = """
import resource, sys
from textgen_jax.data import corpora, prepare
from textgen_jax.text import base
used = []
def peak():
  with open('/proc/self/status') as file:
    return next(int(line.split()[1]) for line in file if line.startswith('VmHWM'))
for path in sys.argv[1:]:
  prepared = prepare.prepare(corpora.DataConfig(path=path), base.TokenizerConfig(kind='byte'))
  used.append(peak())  # ru_maxrss is never less than the parent's was
print(len(prepared.splits['train'].tokens), used[1] - used[0], resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_does_not_grow_with_the_text(tmp_path):
  """60 MB; in memory its ids alone would be 240 MB."""
  (tmp_path / 'small').write_text('abc\n' * 10)
  text = (story(0, 9_999) + '\n').encode()
  with open(tmp_path / 'large', 'wb') as file:
    for _ in range(60_000_000 // len(text)):
      file.write(text)
  done = python(MEMORY, tmp_path / 'small', tmp_path / 'large')
  assert done.returncode == 0, done.stderr
  num_tokens, grown_kib, worker_kib = map(int, done.stdout.split())
  assert num_tokens > 53_000_000
  assert grown_kib < 150_000
  assert worker_kib < 300_000


def test_tokenized_gives_the_same_ids_and_leaves_nothing(tmp_path, cache):
  data = write(tmp_path / 'text', a=story(0, 500), b=story(1, 400))
  ((corpus, _),) = corpora.open_corpora(data)
  for kind, tokenizer in KINDS.items():
    prepared = prepare.prepare(data, tokenizer)
    before = ['prepared', 'tokenized.lock']
    with prepare.tokenized(corpus, prepared.tokenizer) as again:
      assert sorted(os.listdir(cache)) == sorted(before + [again.directory.parent.name])
      assert {split: whole(found) for split, found in again.splits.items()} == {
        split: whole(found) for split, found in prepared.splits.items()
      }
      assert again.names('val') == prepared.names('val')
      assert (again.fingerprint, again.tokenizer.fingerprint()) == (prepared.fingerprint, prepared.tokenizer.fingerprint()), kind
    assert sorted(os.listdir(cache)) == before


def test_tokenized_leaves_nothing_after_an_error_either(tmp_path, cache):
  ((corpus, _),) = corpora.open_corpora(write(tmp_path / 'text', a='abc', b='abd'))
  tokenizer = build.train(CHAR, ['abc'])
  with pytest.raises(errors.UserError, match=r"split val, document b: character 'd' at offset 2"):  # noqa: SIM117
    with prepare.tokenized(corpus, tokenizer):
      pass
  assert sorted(os.listdir(cache)) == ['tokenized.lock']

  def use():
    with prepare.tokenized(corpus, build.train(BYTE, [])):
      raise OSError(errno.ENOENT, 'mine')

  with pytest.raises(OSError, match='mine'):
    use()
  assert sorted(os.listdir(cache)) == ['tokenized.lock']
