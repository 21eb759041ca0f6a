import dataclasses
import hashlib
import json

import numpy as np
import pytest

from textgen_jax import errors
from textgen_jax.data import corpora, prepare
from textgen_jax.text import base


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('TEXTGEN_JAX_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache'


def write(folder, **texts):
  folder.mkdir(exist_ok=True)
  for name, text in texts.items():
    (folder / name).write_bytes(text.encode())
  return corpora.DataConfig(path=str(folder), val_fraction=0.3)


CHAR, BYTE = base.TokenizerConfig(), base.TokenizerConfig(kind='byte')


def test_documents_are_joined_by_their_start(tmp_path):
  data = write(tmp_path / 'text', a='ab\u00e9', b='b\n', c='ba', d='a')
  prepared = prepare.prepare(data, CHAR)  # 8 characters: val is c and d
  assert prepared.splits['train'].tolist() == [1, 2, 3, 0, 2, 0]
  assert prepared.splits['val'].tolist() == [2, 1, 0, 1]
  assert {split: tokens.dtype for split, tokens in prepared.splits.items()} == {'train': np.uint8, 'val': np.uint8}
  assert prepared.tokenizer.decode(prepared.splits['train']) == 'ab\u00e9\nb\n'
  sha256 = hashlib.sha256(bytes([1, 2, 3, 0, 2, 0])).hexdigest()
  about = {'tokens': 6, 'bytes': 7, 'documents': 2, 'sha256': sha256, 'dtype': 'uint8'}
  assert prepared.description['splits']['train'] == about
  assert json.loads((prepared.directory / 'description.json').read_text()) == prepared.description


def test_smallest_type_that_holds_the_vocabulary(tmp_path):
  for size, dtype in [(256, np.uint8), (257, np.uint16), (65_536, np.uint16), (65_537, np.uint32)]:
    text = ''.join(chr(0x10000 + index) for index in range(size))
    prepared = prepare.prepare(write(tmp_path / f'{size}', a=text, b=text), CHAR)
    assert prepared.splits['val'].dtype == dtype
    assert prepared.splits['val'].tolist() == list(range(size))


def test_second_call_reads_no_text_and_writes_nothing(tmp_path, monkeypatch):
  data = write(tmp_path / 'text', a='ab\nabababa')
  first = prepare.prepare(data, CHAR)
  stamp = (first.directory / 'train.bin').stat().st_mtime_ns
  monkeypatch.setattr(prepare, '_write', None)
  again = prepare.prepare(data, CHAR)
  assert (again.directory / 'train.bin').stat().st_mtime_ns == stamp
  assert (again.fingerprint, again.description) == (first.fingerprint, first.description)
  np.testing.assert_array_equal(again.splits['train'], first.splits['train'])


def test_whatever_decides_the_tokens_decides_the_directory(tmp_path):
  data = write(tmp_path / 'text', a='abcabcabcabc')
  cases = [
      (data, CHAR),
      (data, BYTE),
      (data, base.TokenizerConfig(unknown_symbol='?')),
      (dataclasses.replace(data, val_fraction=0.5), CHAR),
      (write(tmp_path / 'other', a='abcabcabcacb'), CHAR),
  ]
  prepared = [prepare.prepare(*case) for case in cases]
  assert len({one.directory for one in prepared}) == len({one.fingerprint for one in prepared}) == 5
  moved = prepare.prepare(write(tmp_path / 'moved', z='abcabcabcabc'), CHAR)
  assert (moved.directory, moved.fingerprint) == (prepared[0].directory, prepared[0].fingerprint)
  assert moved.description['corpus'] == str(tmp_path / 'moved')


@pytest.mark.parametrize('name', ['train.bin', 'val.bin', 'description.json', 'tokenizer/tokenizer.json'])
@pytest.mark.parametrize('damage', ['cut', 'gone', 'empty'])
def test_damaged_files_are_prepared_anew(tmp_path, name, damage):
  data = write(tmp_path / 'text', a='ab\nabababa')
  first = prepare.prepare(data, CHAR)
  good = (first.directory / name).read_bytes()
  if damage == 'gone':
    (first.directory / name).unlink()
  else:
    (first.directory / name).write_bytes(good[:-2] if damage == 'cut' else b'')
  assert prepare.prepare(data, CHAR).fingerprint == first.fingerprint
  assert (first.directory / name).read_bytes() == good


def test_what_a_dead_process_left_is_in_no_ones_way(tmp_path):
  data = write(tmp_path / 'text', a='ab\nabababa')
  first = prepare.prepare(data, CHAR)
  partial = first.directory.with_suffix('.partial')
  first.directory.rename(partial)
  (partial / 'junk').write_text('')
  again = prepare.prepare(data, CHAR)
  assert again.fingerprint == first.fingerprint
  assert not partial.exists()
  assert not (again.directory / 'junk').exists()


def test_unknown_character_names_split_document_and_offset(tmp_path, cache):
  data = write(tmp_path / 'text', a='abcabc', b='abz')
  with pytest.raises(errors.UserError, match=r"split val, document .*/b: character 'z' at offset 2 .*unknown_symbol"):
    prepare.prepare(data, CHAR)
  assert [path.suffix for path in (cache / 'prepared').iterdir()] == ['.lock']
  prepared = prepare.prepare(data, base.TokenizerConfig(unknown_symbol='?'))
  assert prepared.splits['val'].tolist() == [0, 1, prepared.tokenizer.special_ids['unknown']]


def test_wrong_configuration_is_refused_before_any_text_is_read(tmp_path):
  with pytest.raises(errors.UserError, match=r'tokenizer\.kind'):
    prepare.prepare(corpora.DataConfig(path=str(tmp_path / 'missing')), base.TokenizerConfig(kind='bite'))


def test_cache_that_cannot_be_written_is_a_machine_fault(tmp_path, monkeypatch):
  data = write(tmp_path / 'text', a='ab\nabababa')
  monkeypatch.setenv('TEXTGEN_JAX_CACHE', str(tmp_path / 'text' / 'a'))
  with pytest.raises(errors.MachineFailed, match='TEXTGEN_JAX_CACHE'):
    prepare.prepare(data, CHAR)
