import fractions
import gzip
import json
import os
import random

import pytest
import zstandard

from textgen_jax import errors
from textgen_jax.data import files

WIDE = 'a\u00e9\u4e16\U0001f600\r\n'  # characters of 1, 2, 3 and 4 bytes


def parts_of(corpus, split):
  """Names and parts of its documents, whose files are open no longer than the next document isn't asked for."""
  return [(document.name, list(document.parts)) for document in corpus.read(split)]


def documents(path, val_fraction=0.1, field='text'):
  """Names and texts of each split's documents."""
  corpus = files.open_files(str(path), field, val_fraction)
  found = {split: parts_of(corpus, split) for split in corpus.splits}
  return {split: [(name, ''.join(part.text for part in parts)) for name, parts in read] for split, read in found.items()}


def texts(path, val_fraction=0.1, field='text'):
  return {split: [text for _, text in found] for split, found in documents(path, val_fraction, field).items()}


def jsonl(*rows):
  return ''.join(json.dumps({'text': row}) + '\n' for row in rows).encode()


def pack(path, data):
  """Writes `data` as the path's ending asks."""
  packers = {'.gz': gzip.compress, '.zst': zstandard.ZstdCompressor(write_checksum=True).compress}
  path.write_bytes(packers.get(path.suffix, bytes)(data))
  return path


def by_hand(sizes, val_fraction):
  """How many last documents are held out: the fewest that reach the fraction, never all."""
  wanted = fractions.Fraction(str(val_fraction)) * sum(sizes)
  return next(count for count in range(1, len(sizes) + 1) if sum(sizes[-count:]) >= wanted or count == len(sizes) - 1)


@pytest.mark.parametrize('block_bytes', [*range(1, 8), 1 << 20])
@pytest.mark.parametrize('suffix', ['', '.txt', '.gz', '.zst'])
def test_blocks_join_to_the_text(tmp_path, monkeypatch, block_bytes, suffix):
  monkeypatch.setattr(files, 'BLOCK_BYTES', block_bytes)
  path = pack(tmp_path / f'a{suffix}', (WIDE * 3).encode())
  assert documents(path, 1 / 3) == {'train': [(path.name, WIDE * 2)], 'val': [(path.name, WIDE)]}
  corpus = files.open_files(str(path), 'text', 1.0)
  ((_, parts),) = parts_of(corpus, 'val')
  assert all(part.text and part.is_reply for part in parts)
  assert all(len(part.text.encode()) < block_bytes + 4 for part in parts)
  assert corpus.characters == 18


def test_nothing_is_held_whole(tmp_path, monkeypatch):
  monkeypatch.setattr(files, 'BLOCK_BYTES', 64)
  for name in ('a.txt', 'a.gz', 'a.zst'):
    path = pack(tmp_path / name, b'0123456789' * 100)
    for split in ('train', 'val'):
      ((_, parts),) = parts_of(files.open_files(str(path), 'text', 0.5), split)
      assert [len(part.text) for part in parts] == ([64] * 7 + [52] if split == 'train' else [12] + [64] * 7 + [40])


@pytest.mark.parametrize('block_bytes', [1, 5, 1 << 20])
@pytest.mark.parametrize('suffix', ['', '.gz', '.zst'])
def test_each_line_of_a_jsonl_is_a_document(tmp_path, monkeypatch, block_bytes, suffix):
  monkeypatch.setattr(files, 'BLOCK_BYTES', block_bytes)
  rows = [{'id': 1, 'body': WIDE}, {'body': 'two\nlines\u2028', 'text': 'not this'}, {'body': 'c'}]
  data = '\n'.join(json.dumps(row, ensure_ascii=index == 1) for index, row in enumerate(rows))  # no end of the last line
  path = pack(tmp_path / f'a.jsonl{suffix}', data.encode())
  assert documents(path, 0.01, 'body') == {
    'train': [(f'{path.name}:1', WIDE), (f'{path.name}:2', 'two\nlines\u2028')],
    'val': [(f'{path.name}:3', 'c')],
  }


@pytest.mark.parametrize('block_bytes', [1, 3, 1 << 20])
def test_frames_and_members_that_follow_each_other_are_one_text(tmp_path, monkeypatch, block_bytes):
  monkeypatch.setattr(files, 'BLOCK_BYTES', block_bytes)
  data = (WIDE * 2).encode()
  for suffix, compress in (('gz', gzip.compress), ('zst', zstandard.compress)):
    path = tmp_path / f'a.{suffix}'
    path.write_bytes(b''.join(compress(part) for part in (data[:5], b'', data[5:6], data[6:])))  # the first cut goes through U+4E16
    assert texts(path, 1.0) == {'val': [WIDE * 2]}
    path = tmp_path / f'b.jsonl.{suffix}'
    rows = jsonl('abc', 'de', 'f')
    path.write_bytes(b''.join(compress(part) for part in (rows[:7], rows[7:25], rows[25:])))
    assert texts(path, 0.5) == {'train': ['abc'], 'val': ['de', 'f']}


@pytest.mark.parametrize(
  ('val_fraction', 'cut'), [(0.1, 9), (0.01, 9), (0.001, 9), (0.2, 8), (0.29, 7), (0.3, 7), (0.8, 2), (0.9, 1), (0.999, 1)]
)
def test_one_document_gives_its_last_characters(tmp_path, monkeypatch, val_fraction, cut):
  text = '0123\r\n6\u4e168\u00e9'
  for name, data in (('a.txt', text.encode()), ('a.jsonl', jsonl(text))):
    for block_bytes in (1, 4, 1 << 20):
      monkeypatch.setattr(files, 'BLOCK_BYTES', block_bytes)
      path = pack(tmp_path / name, data)
      assert texts(path, val_fraction) == {'train': [text[:cut]], 'val': [text[cut:]]}


def test_two_characters_are_the_least(tmp_path):
  (tmp_path / 'a').write_text('\u4e16b')
  assert texts(tmp_path / 'a', 0.5) == {'train': ['\u4e16'], 'val': ['b']}
  (tmp_path / 'b').write_text('c')
  for path in (tmp_path / 'b', f'{tmp_path}/b,{tmp_path}/b'):
    with pytest.raises(errors.UserError, match=r'data\.path=.*/b holds less than 2 characters'):
      texts(path)


@pytest.mark.parametrize('val_fraction', [0.01, 0.07, 0.1, 0.3, 0.5, 0.55, 0.57, 0.9, 0.99])
def test_several_documents_stay_whole(tmp_path, val_fraction):
  generator = random.Random(str(val_fraction))
  cases = [[20, 25, 55], [3, 4, 3], [1, 1], [43, 57], [93, 7], [1, 99], [99, 1]]
  cases += [[generator.randint(1, 9) for _ in range(generator.randint(2, 9))] for _ in range(20)]
  for index, sizes in enumerate(cases):
    rows = [chr(97 + place) * size for place, size in enumerate(sizes)]
    held_out = by_hand(sizes, val_fraction)
    expected = {'train': rows[:-held_out], 'val': rows[-held_out:]}
    path = pack(tmp_path / f'{index}.jsonl', jsonl(*rows))
    assert texts(path, val_fraction) == expected, sizes
    folder = tmp_path / f'{index}'  # the same documents: some files, some lines
    folder.mkdir()
    pack(folder / '0.txt', rows[0].encode())
    pack(folder / '1.jsonl.zst', jsonl(*rows[1:-1])) if rows[1:-1] else None
    pack(folder / '2.txt.gz', rows[-1].encode())
    assert texts(folder, val_fraction) == expected, sizes


def test_a_fraction_of_one_holds_all_out(tmp_path):
  pack(tmp_path / 'a.txt', b'ab')
  assert texts(tmp_path / 'a.txt', 1.0) == {'val': ['ab']}
  pack(tmp_path / 'b.jsonl', jsonl('c', 'd'))
  assert texts(tmp_path, 1.0) == {'val': ['ab', 'c', 'd']}
  assert list(files.open_files(str(tmp_path), 'text', 1.0).read('train')) == []


def test_a_split_reads_the_same_each_time(tmp_path):
  pack(tmp_path / 'b.jsonl', jsonl('c', 'd', 'e'))
  corpus = files.open_files(str(tmp_path), 'text', 0.4)
  first, second = corpus.read('val'), corpus.read('train')
  assert [next(second).name, next(first).name, next(second, None), next(first).name] == [
    'b.jsonl:1', 'b.jsonl:2', None, 'b.jsonl:3',
  ]  # fmt: skip
  assert [document.name for document in corpus.read('train')] == ['b.jsonl:1']
  assert corpus.name == str(tmp_path)


def test_documents_are_named_from_the_folder_that_holds_all(tmp_path):
  for name in ('x/a.txt', 'x/y/b.jsonl'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    pack(tmp_path / name, jsonl('abc', 'de'))
  for path, names in [
    ('', ['a.txt', 'y/b.jsonl:1', 'y/b.jsonl:2']),
    ('/x', ['a.txt', 'y/b.jsonl:1', 'y/b.jsonl:2']),
    ('/x/y', ['b.jsonl:1', 'b.jsonl:2']),
    ('/x/y/b.jsonl', ['b.jsonl:1', 'b.jsonl:2']),
    (f'/x/a.txt,{tmp_path}/x/y', ['a.txt', 'y/b.jsonl:1', 'y/b.jsonl:2']),
  ]:
    assert [name for name, _ in documents(f'{tmp_path}{path}', 1.0)['val']] == names


def test_key_is_of_names_texts_and_the_split_but_not_of_the_place(tmp_path, monkeypatch):
  def key(path, val_fraction=0.1, field='text'):
    return files.open_files(str(path), field, val_fraction).key

  for folder in ('one', 'two', 'two/three'):
    (tmp_path / folder).mkdir()
    pack(tmp_path / folder / 'a', WIDE.encode())
  same = [key(tmp_path / 'one'), key(tmp_path / 'one' / 'a'), key(tmp_path / 'two' / 'three'), key(f'{tmp_path}/two/a')]
  monkeypatch.chdir(tmp_path / 'one')
  monkeypatch.setattr(files, 'BLOCK_BYTES', 3)
  same += [key('a'), key('.'), key('*'), key('../two/a')]
  assert len(set(same)) == 1
  keys = [key(pack(tmp_path / 'h', text), fraction) for text, fraction in [
    (b'ab\ncd', 0.1), (b'ab\ncd', 0.2), (b'ab\ncd', 1.0), (b'ab\ncD', 0.1), (b'ab\nc', 0.1),
  ]]  # fmt: skip
  rows = [['ab', 'cd'], ['abc', 'd'], ['a', 'bcd'], ['abcd'], ['cd', 'ab'], ['zz', 'ab'], ['ab', 'cd', 'e']]
  keys += [key(pack(tmp_path / 'i.jsonl', jsonl(*row))) for row in rows]
  pack(tmp_path / 'other', b'ab\ncd')
  keys += [key(tmp_path / 'other'), key(f'{tmp_path}/h,{tmp_path}/other'), key(tmp_path / 'two')]
  assert len(set(keys + same)) == len(keys) + 1
  (tmp_path / 'i.jsonl').write_text('{"body": "ab", "id": 1}\n{"id": 2, "body": "cd"}')
  assert key(tmp_path / 'i.jsonl', field='body') == keys[5]


def test_paths_that_name_several_files(tmp_path, monkeypatch):
  for name in ('c.txt', 'a.txt', 'sub/b.txt', '.hidden', '.git/x', 'sub/.hidden', 'sub/.git/y'):
    (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / name).write_text(name)
  a, b, c = 'a.txt', 'sub/b.txt', 'c.txt'
  for path, expected in [
    ('', [a, c, b]), ('/', [a, c, b]), ('/*.txt', [a, c]), ('/**/*.txt', [a, c, b]), ('/*', [a, c, b]), ('/[ab].txt', [a]),
    (f'/c.txt, {tmp_path}/[ab].txt', [a, c]), (f',{tmp_path}/a.txt', [a, c, b]), (f'/a.txt,{tmp_path}/a.txt,,', [a]),
    (f'/sub,{tmp_path}/c.txt', [c, b]), ('/.hidden', ['.hidden']),
  ]:  # fmt: skip
    assert [text for _, found in documents(f'{tmp_path}{path}').items() for _, text in found] == (
      [expected[0][:-1], expected[0][-1]] if len(expected) == 1 else expected
    ), path
  monkeypatch.setenv('HOME', str(tmp_path))
  assert documents('~/sub')['val'] == [('b.txt', 't')]


def test_path_that_exists_is_taken_as_written(tmp_path):
  (tmp_path / 'a,b*.txt').write_text('this one')
  (tmp_path / 'a').write_text('not this')
  assert texts(tmp_path / 'a,b*.txt', 1.0) == {'val': ['this one']}


@pytest.mark.parametrize('path', ['missing.txt', '*.txt', 'there,missing', '', 'folder'])
def test_path_to_nothing_is_named(tmp_path, path):
  (tmp_path / 'there').write_text('some text')
  (tmp_path / 'folder' / '.hidden').mkdir(parents=True)
  path = f'{tmp_path}/{path}' if path else ','
  with pytest.raises(errors.UserError, match=r'data\.path=.*(doesn.t exist|no files)'):
    texts(path)


NOT_TEXT = [
  ('not.txt', b'ab\xffcd', r"/not\.txt isn't UTF-8 text: byte 0xff at offset 2$"),
  ('late.txt', 'a\u4e16'.encode() * 10 + b'\xc3(', r'/late\.txt .*byte 0xc3 at offset 40$'),
  ('cut.txt', b'ab' + '\u4e16'.encode()[:2], r'/cut\.txt .*byte 0xe4 at offset 2$'),
  ('long.txt', b'0123456' + b'\xf0\x9f\x98' + b'ab', r'byte 0xf0 at offset 7$'),
  ('overlong.txt', b'ab\xc0\x80', r'byte 0xc0 at offset 2$'),
  ('surrogate.txt', b'ab\xed\xa0\x80', r'byte 0xed at offset 2$'),
  ('packed.gz', b'ab\xffcd', r'/packed\.gz .*byte 0xff at offset 2$'),
  ('packed.zst', b'ab' * 20 + b'\xff', r'/packed\.zst .*byte 0xff at offset 40$'),
  ('nul.txt', 'a\u4e16\0b'.encode(), r"/nul\.txt holds NUL, '\\x00', at character 2, "),
  ('nul0.txt', b'\0b', r'/nul0\.txt holds NUL, .* at character 0, '),
  ('nul.zst', ('\u4e16' * 21 + '\0').encode(), r'holds NUL, .* at character 21, '),
  ('mark.txt', 'a\u4e16\ufeffb'.encode(), r"/mark\.txt holds a byte-order mark, '\\ufeff', at character 2, "),
  ('mark0.txt', '\ufeffab'.encode(), r'/mark0\.txt (begins with a byte-order mark|holds a byte-order mark, .* at character 0)'),
  ('empty.txt', b'', r'/empty\.txt is empty$'),
  ('empty.gz', b'', r'/empty\.gz is empty$'),
  ('empty.zst', b'', r'/empty\.zst is empty$'),
  ('empty.jsonl', b'', r'/empty\.jsonl is empty$'),
  ('empty.jsonl.zst', b'', r'/empty\.jsonl\.zst is empty$'),
  ('none.jsonl', jsonl('a', 'b') + jsonl(''), r'/none\.jsonl, line 3 is an empty document$'),
  ('field.jsonl', jsonl('a') + b'{"body": "b"}\n', r'/field\.jsonl, line 2 has no text in the field data\.field=text$'),
  ('number.jsonl.gz', jsonl('a') + b'{"text": 1}\n', r'/number\.jsonl\.gz, line 2 has no text in the field data\.field=text$'),
  ('null.jsonl', b'{"text": null}\n', r'/null\.jsonl, line 1 has no text in the field'),
  ('list.jsonl', jsonl('a') + b'["text"]\n', r'/list\.jsonl, line 2 has no text in the field'),
  ('json.jsonl', jsonl('a') + b'{"text": "b"\n' + jsonl('c'), r"/json\.jsonl, line 2 isn't JSON: "),
  ('blank.jsonl', jsonl('a') + b'\n' + jsonl('c'), r"/blank\.jsonl, line 2 isn't JSON: "),
  ('deep.jsonl', b'[' * 100_000 + b'\n', r"/deep\.jsonl, line 1 isn't JSON: "),
  ('bytes.jsonl', jsonl('a') + b'{"text": "b\xff"}\n', r"/bytes\.jsonl, line 2 isn't (JSON|UTF-8).* 0xff .*11"),
  ('half.jsonl', jsonl('a', 'bc\ud83d'), r"/half\.jsonl, line 2 holds '\\ud83d' at character 2: half a surrogate pair"),
  ('nul.jsonl', jsonl('a', 'bc\0'), r'/nul\.jsonl, line 2 holds NUL, .* at character 2, '),
  ('mark.jsonl', jsonl('a', '\ufeffb'), r'/mark\.jsonl, line 2 holds a byte-order mark, .* at character 0, '),
  ('mark0.jsonl', b'\xef\xbb\xbf' + jsonl('abc'), r'/mark0\.jsonl.* (byte-order mark|BOM)'),
  ('wide.jsonl', '{"text": "abc"}'.encode('utf-16-le'), r"/wide\.jsonl, line 1 isn't "),
]  # fmt: skip


@pytest.mark.parametrize('block_bytes', [1, 4, 5, 1 << 20])
@pytest.mark.parametrize(('name', 'content', 'message'), NOT_TEXT, ids=[name for name, _, _ in NOT_TEXT])
def test_what_is_not_text_is_named_with_its_place(tmp_path, monkeypatch, name, content, message, block_bytes):
  monkeypatch.setattr(files, 'BLOCK_BYTES', block_bytes)
  pack(tmp_path / name, content)
  (tmp_path / 'a.txt').write_text('a good one')
  with pytest.raises(errors.UserError, match=message):
    files.open_files(f'{tmp_path}/a.txt,{tmp_path}/{name}', 'text', 0.1)


def test_a_surrogate_pair_in_json_is_a_character(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": "\\ud83d\\ude00b"}')
  assert texts(tmp_path / 'a.jsonl', 1.0) == {'val': ['\U0001f600b']}


def test_a_line_too_long_to_be_read_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(files, 'MAX_LINE_BYTES', 64)
  for name in ('a.jsonl', 'a.jsonl.gz', 'a.jsonl.zst'):
    pack(tmp_path / name, jsonl('a', 'b' * 64))
    with pytest.raises(errors.UserError, match=rf'{name}, line 2 is longer than 64 bytes'):
      texts(tmp_path / name)


@pytest.mark.parametrize('name', ['a.gz', 'a.zst', 'a.jsonl.gz', 'a.jsonl.zst'])
def test_damaged_and_cut_archives_are_named(tmp_path, name):
  generator = random.Random(0)
  rows = [''.join(generator.choices('abcdefgh', k=50)) for _ in range(200)]
  path = pack(tmp_path / name, jsonl(*rows) if 'jsonl' in name else '\n'.join(rows).encode())
  good = path.read_bytes()
  for cut in (1, 3, 7, 100, len(good) // 2, len(good) - 5, len(good) - 1):
    path.write_bytes(good[:cut])
    with pytest.raises(errors.UserError, match=rf'{name} is damaged'):
      texts(path)
    path.write_bytes(good + good[:cut])
    with pytest.raises(errors.UserError, match=rf'{name} is damaged'):
      texts(path)
  wrong = bytearray(good)
  wrong[len(good) // 2] ^= 0x55
  for data in (bytes(wrong), good + b'junk', b'junk'):
    path.write_bytes(data)
    with pytest.raises(errors.UserError, match=rf'{name}(, line \d+)? (is damaged|isn)'):
      texts(path)


def test_what_is_no_file_or_cannot_be_read_is_named(tmp_path):
  (tmp_path / 'a').write_text('some text')
  os.mkfifo(tmp_path / 'fifo')
  for path in (tmp_path / 'fifo', tmp_path):  # opened, it would wait for ever
    with pytest.raises(errors.UserError, match=r'data\.path: .*/fifo is not a regular file'):
      texts(path)
  (tmp_path / 'fifo').unlink()
  os.symlink(tmp_path / 'nowhere', tmp_path / 'link')
  with pytest.raises(errors.UserError, match=r'/link'):
    texts(tmp_path)


CHANGES = {
  'longer': ('a.txt', b'abcdefgh', b'abcdefghi'),
  'shorter': ('a.txt', b'abcdefgh', b'abcdefg'),
  'other': ('a.txt', b'abcdefgh', b'abcdefgH'),
  'a longer line': ('a.jsonl', jsonl('ab', 'cd', 'ef'), jsonl('ab', 'cde', 'ef')),
  'a line less': ('a.jsonl', jsonl('ab', 'cd', 'ef'), jsonl('ab', 'cd')),
  'a line more': ('a.jsonl', jsonl('ab', 'cd', 'ef'), jsonl('ab', 'cd', 'ef', 'gh')),
  'empty': ('a.jsonl', jsonl('ab', 'cd', 'ef'), b''),
}


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('alone', [True, False])
def test_a_file_that_changes_after_its_survey_is_named(tmp_path, change, alone):
  name, before, after = CHANGES[change]
  (tmp_path / name).write_bytes(before)
  os.utime(tmp_path / name, (0, 0))  # or both writes might have one time
  if not alone:
    (tmp_path / 'b.txt').write_text('cd')
  corpus = files.open_files(str(tmp_path), 'text', 0.4)
  (tmp_path / name).write_bytes(after)
  with pytest.raises(errors.UserError, match=rf'{name}.* (changed|is empty)'):
    [parts_of(corpus, split) for split in corpus.splits]


def test_a_file_that_goes_after_its_survey_is_named(tmp_path):
  for name in ('a.txt', 'b.gz', 'c.jsonl.zst'):
    path = pack(tmp_path / name, jsonl('abc', 'def'))
    corpus = files.open_files(str(path), 'text', 0.4)
    path.unlink()
    with pytest.raises(errors.UserError, match=rf"can't read .*/{name}: No such file"):
      list(corpus.read('train'))
