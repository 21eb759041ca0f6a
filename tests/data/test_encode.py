import itertools
import os
import random
import signal
import sys
import threading

import numpy as np
import pytest

from textgen_jax import errors
from textgen_jax.data import documents, encode
from textgen_jax.text import base, byte, char

TEXT = 'one two\u00e9\n\nthree\u4e16 four\n \U0001f600five, six seven eight\n'


def document(name, *texts, replies=()):
  return documents.Document(name, [documents.Part(text, not replies or replies[i]) for i, text in enumerate(texts)])


def after_line(text):
  return text.rfind('\n') + 1


def before_space(text):
  return max(text.rfind(' '), 0)


CUTS = {'anywhere': len, 'after a line': after_line, 'before a space': before_space, 'nowhere': lambda text: 0}


def allowed(cut, text):
  """Every place where `cut` would cut, with more or less of the text in sight; only what stands before a place decides, and the next."""
  return {cut(text[:stop]) for stop in range(1, len(text) + 1)}


@pytest.mark.parametrize('job_characters', [1, 2, 7, 1000])
@pytest.mark.parametrize('cut', CUTS)
def test_pieces_join_to_the_document_and_are_cut_where_that_is_allowed(monkeypatch, cut, job_characters):
  monkeypatch.setattr(encode, 'JOB_CHARACTERS', job_characters)
  generator = random.Random(job_characters)
  for _ in range(50):
    places = sorted(generator.choices(range(1, len(TEXT)), k=generator.randint(0, 6)))
    parts = [TEXT[a:b] for a, b in itertools.pairwise([0, *places, len(TEXT)]) if a < b]
    pieces = list(encode.pieces([document('a', *parts), document('b', 'x')], CUTS[cut]))
    assert pieces.pop() == ('x', True, 'b', 0)
    assert ''.join(piece.text for piece in pieces) == TEXT
    assert all(piece.text for piece in pieces)
    assert [piece.offset for piece in pieces] == [0, *itertools.accumulate(len(piece.text) for piece in pieces[:-1])]
    assert {(piece.document, piece.is_reply) for piece in pieces} == {('a', True)}
    assert {piece.offset for piece in pieces} <= allowed(CUTS[cut], TEXT) | {0}
    if cut == 'anywhere':
      assert all(len(piece.text) <= job_characters for piece in pieces)
    if cut == 'nowhere':
      assert [piece.text for piece in pieces] == [TEXT]


def test_a_cut_is_looked_for_further_on_where_there_is_none_near(monkeypatch):
  monkeypatch.setattr(encode, 'JOB_CHARACTERS', 4)
  read = [document('a', 'abcdef', 'gh\nab', '\nxyz12\n3\n', 'q')]
  assert [piece.text for piece in encode.pieces(read, after_line)] == ['abcdefgh\n', 'ab\n', 'xyz12\n3\n', 'q']


def test_replies_are_pieces_of_their_own(monkeypatch):
  for size in (1, 3, 100):
    monkeypatch.setattr(encode, 'JOB_CHARACTERS', size)
    for cut in CUTS.values():
      said = [('q one\n', False), ('q two\n', False), ('r three\n', True), ('q\n', False), ('r\n', True), ('r 2\n', True)]
      pieces = list(encode.pieces([document('a', *(text for text, _ in said), replies=[reply for _, reply in said])], cut))
      per_character = [piece.is_reply for piece in pieces for _ in piece.text]
      assert per_character == [reply for text, reply in said for _ in text]
      assert ''.join(piece.text for piece in pieces) == ''.join(text for text, _ in said)
      assert [piece.offset for piece in pieces] == [0, *itertools.accumulate(len(piece.text) for piece in pieces[:-1])]
      if size == 100:
        assert [piece.text for piece in pieces] == ['q one\nq two\n', 'r three\n', 'q\n', 'r\nr 2\n']


def test_pieces_and_jobs_read_no_further_than_they_must(monkeypatch):
  monkeypatch.setattr(encode, 'JOB_CHARACTERS', 4)
  read = []

  def parts():
    for i in range(1000):
      read.append(i)
      yield documents.Part('ab\n')

  jobs = encode.jobs(encode.pieces(iter([documents.Document('a', parts())]), after_line))
  assert ''.join(piece.text for piece in next(jobs)) == 'ab\nab\n'
  assert len(read) <= 3


def test_jobs_are_pieces_in_order_and_of_a_size(monkeypatch):
  monkeypatch.setattr(encode, 'JOB_CHARACTERS', 10)
  pieces = [encode.Piece('x' * size, True, f'{i}', 0) for i, size in enumerate([3, 6, 1, 10, 9, 5, 30, 2])]
  jobs = list(encode.jobs(pieces))
  assert [[piece.document for piece in job] for job in jobs] == [['0', '1', '2'], ['3'], ['4', '5'], ['6'], ['7']]
  assert list(itertools.chain(*jobs)) == pieces
  assert list(encode.jobs([])) == []


def test_measures_of_a_piece_by_hand():
  text = ' ab\u00e9 z\u4e16\n'
  one = encode.encode(byte.ByteTokenizer(), encode.Piece(text, True, 'a', 0))
  assert one.ids.tolist() == list(text.encode())
  assert one.ids.dtype == np.uint16
  assert (one.bytes, one.words, one.in_word, one.unknowns, one.unknown_bytes) == (11, 2, (False, False), 0, 0)
  unknown = encode.encode(char.CharTokenizer(' abz', '?'), encode.Piece(text[1:6], True, 'a', 1))
  assert unknown.ids.tolist() == [1, 2, 4, 0, 3]
  assert (unknown.bytes, unknown.words, unknown.in_word, unknown.unknowns, unknown.unknown_bytes) == (6, 2, (True, True), 1, 2)


def test_the_smallest_type_of_two_that_holds_every_id():
  for size, expected in [(2, 'uint16'), (65_535, 'uint16'), (65_536, 'uint16'), (65_537, 'uint32')]:
    assert encode.id_type(size).name == expected
    assert np.iinfo(encode.id_type(size)).max >= size - 1


def test_an_id_outside_the_vocabulary_is_no_token(monkeypatch):
  tokenizer = byte.ByteTokenizer()
  for wrong in (257, 70_000, -1):
    monkeypatch.setattr(tokenizer, 'encode', lambda text, wrong=wrong: np.array([1, wrong]), raising=False)
    with pytest.raises(errors.UserError, match=r'document a: token id'):
      encode.encode(tokenizer, encode.Piece('ab', True, 'a', 0))


def test_text_without_ids_is_named_with_its_document_and_place():
  tokenizer = char.CharTokenizer('ab', '')
  with pytest.raises(errors.UserError, match=r"^document d: character 'z' at offset 2 (?!.*counted)"):
    encode.encode(tokenizer, encode.Piece('abz', True, 'd', 0))
  with pytest.raises(errors.UserError, match=r"^document d: character 'z' at offset 2 .*\(counted from its character 1,234\)$"):
    encode.encode(tokenizer, encode.Piece('abz', True, 'd', 1234))


@pytest.fixture
def started(monkeypatch):
  """The worker processes that are started."""
  processes, real = [], encode.subprocess.Popen

  def start(*args, **kwargs):
    processes.append(real(*args, **kwargs))
    return processes[-1]

  monkeypatch.setattr(encode.subprocess, 'Popen', start)
  yield processes
  assert all(process.poll() is not None for process in processes)  # reaped, too
  for process in processes:
    with pytest.raises(ProcessLookupError):
      os.kill(process.pid, 0)


def make_jobs(tokenizer, text):
  return encode.jobs(encode.pieces([document('a', text), document('b', text[::-1])], tokenizer.cut))


@pytest.mark.parametrize('kind', ['char', 'unknown', 'byte'])
def test_workers_give_what_one_process_gives(monkeypatch, started, kind):
  monkeypatch.setattr(encode, 'JOB_CHARACTERS', 5)
  tokenizer = {
    'char': char.CharTokenizer.train(base.TokenizerConfig(), [TEXT]),
    'unknown': char.CharTokenizer(' efo', '?'),
    'byte': byte.ByteTokenizer(),
  }[kind]
  here = list(encode.encode_all(tokenizer, make_jobs(tokenizer, TEXT * 20), workers=0))
  assert not started
  there = list(encode.encode_all(tokenizer, make_jobs(tokenizer, TEXT * 20), workers=2))
  assert len(started) == 2
  assert len(here) > 100
  for (job, results), (other_job, others) in zip(here, there, strict=True):
    assert job == other_job
    for one, other in zip(results, others, strict=True):
      assert one.ids.tolist() == other.ids.tolist()
      assert one.ids.dtype == other.ids.dtype
      assert one[1:] == other[1:]
  whole = np.concatenate([tokenizer.encode(text) for text in (TEXT * 20, (TEXT * 20)[::-1])])
  assert np.concatenate([one.ids for _, results in there for one in results]).tolist() == whole.tolist()


def test_no_jobs_and_fewer_jobs_than_workers(started):
  tokenizer = byte.ByteTokenizer()
  assert list(encode.encode_all(tokenizer, [], workers=2)) == []
  ((job, (one,)),) = encode.encode_all(tokenizer, [[encode.Piece('ab', True, 'a', 0)]], workers=2)
  assert (job[0].text, one.ids.tolist()) == ('ab', [97, 98])


def test_an_error_in_a_worker_reaches_the_caller(monkeypatch, started):
  monkeypatch.setattr(encode, 'JOB_CHARACTERS', 4)
  tokenizer = char.CharTokenizer('ab', '')
  pieces = encode.pieces([document('good', 'ab' * 10), document('bad', 'ab' * 5 + 'z' + 'ab' * 50)], tokenizer.cut)
  done = []
  with pytest.raises(errors.UserError, match=r"^document bad: character 'z' at offset 2 .*\(counted from its character 8\)$"):
    done.extend(encode.encode_all(tokenizer, encode.jobs(pieces), workers=2))
  assert len(started) == 2


def test_an_error_of_the_reader_reaches_the_caller(started):
  def jobs():
    yield [encode.Piece('ab', True, 'a', 0)]
    raise errors.UserError('changed while it was read')

  with pytest.raises(errors.UserError, match='changed while it was read'):
    list(encode.encode_all(byte.ByteTokenizer(), jobs(), workers=2))
  assert len(started) == 2


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_dies_is_a_machine_fault(started, number):
  def jobs():
    for i in range(1000):
      if i == 20:
        for process in started:
          os.kill(process.pid, number)
      yield [encode.Piece(f'{i}', True, 'a', 0)]

  with pytest.raises(errors.MachineFailed, match=rf'a process that encodes text died with code -{int(number)}'):
    list(encode.encode_all(byte.ByteTokenizer(), jobs(), workers=2))


@pytest.mark.parametrize('large', [False, True])
def test_a_worker_that_cannot_start_is_a_machine_fault(monkeypatch, started, large):
  monkeypatch.setattr(sys, 'executable', '/bin/false')
  # More than a pipe holds: it breaks while the tokenizer is sent.
  characters = ''.join(map(chr, range(0x10000, 0x40000 if large else 0x10010)))
  with pytest.raises(errors.MachineFailed, match='a process that encodes text died with code 1'):
    list(encode.encode_all(char.CharTokenizer(characters, ''), [[encode.Piece('a', True, 'a', 0)]], workers=2))


def test_what_a_worker_says_that_is_no_result_is_a_machine_fault(monkeypatch, started):
  # A library that prints, say. The process lives on: nobody may wait for its end.
  code = 'import sys, time; print("hello", flush=True); sys.stdin.buffer.read()'
  real = encode.subprocess.Popen
  monkeypatch.setattr(encode.subprocess, 'Popen', lambda command, **more: real([command[0], '-c', code], **more))
  rescuer = threading.Timer(10, lambda: [process.kill() for process in started])
  rescuer.start()
  with pytest.raises(errors.MachineFailed):
    list(encode.encode_all(byte.ByteTokenizer(), [[encode.Piece('a', True, 'a', 0)]], workers=1))
  assert rescuer.is_alive()
  rescuer.cancel()


def test_workers_end_with_the_generator(started):
  jobs = ([encode.Piece(f'{i}', True, 'a', 0)] for i in itertools.count())
  results = encode.encode_all(byte.ByteTokenizer(), jobs, workers=2)
  for i in range(3):
    _, (one,) = next(results)
    assert one.ids.tolist() == list(f'{i}'.encode())
  assert [process.poll() for process in started] == [None, None]
  results.close()
  assert [process.poll() for process in started] == [-signal.SIGKILL] * 2


def test_workers_import_no_jax(started):
  """Each would take a second and 200 MB, and might take the accelerator."""
  results = encode.encode_all(byte.ByteTokenizer(), ([encode.Piece('a', True, 'a', 0)] for _ in range(50)), workers=1)
  next(results)
  with open(f'/proc/{started[0].pid}/maps', encoding='utf-8') as file:
    assert 'jaxlib' not in file.read()
  results.close()
