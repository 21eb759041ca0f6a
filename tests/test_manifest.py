"""Manifests: what they hold, texts written again from them, and files that are none."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sample
from textgen_jax import errors, generator
from textgen_jax.sampling import manifest
from textgen_jax.sampling.params import SamplingParams
from textgen_jax.text import base, char

ROOT = pathlib.Path(__file__).parent.parent
PROMPTS = ['the king', 'a', 'a ship of war', '', 'sea']
OTHER = SamplingParams(
  max_new_tokens=9, temperature=0.7, top_k=5, logit_bias={3: -1.5}, banned_tokens=[4], stop=['q\n', '\u2028'], stop_tokens=[7],
  stop_regex='x.', min_log_prob=-1e30, num_samples=2, log_probs=True, alternatives=3, seed=np.int64(2**32 - 1), begins_document=True,
)  # fmt: skip


@pytest.fixture(scope='module')
def made(trained, tmp_path_factory):
  """A manifest of five prompts, two samples each, with log-probabilities, in batches of three rows."""
  directory = tmp_path_factory.mktemp('manifest')
  (directory / 'prompts.txt').write_text('\n'.join(PROMPTS))
  flags = ['--num_samples=2', '--max_new_tokens=12', '--seed=3', '--log_probs', '--alternatives=2', '--batch_size=3', '--stop=q']
  flags += [f'--prompts_file={directory}/prompts.txt', f'--manifest={directory}/made.jsonl', f'--output={directory}/out.txt']
  assert sample.main(['sample.py', f'--workdir={trained}', *flags]) == 0
  return directory / 'made.jsonl'


def reproduce(capsys, trained, path, *flags):
  capsys.readouterr()
  code = sample.main(['sample.py', f'--workdir={trained}', f'--reproduce={path}', *flags])
  return code, *capsys.readouterr()


def edited(made, tmp_path, change, line=0):
  """A copy whose line was changed: `change(content)` gives the new one, or None where it changed the old."""
  lines = made.read_bytes().splitlines(keepends=True)
  content = json.loads(lines[line])
  changed = change(content)
  content = content if changed is None else changed
  lines[line] = content if isinstance(content, bytes) else json.dumps(content, ensure_ascii=line == 0).encode() + b'\n'
  path = tmp_path / 'edited.jsonl'
  path.write_bytes(b''.join(lines))
  return path


def test_settings_survive_as_strict_json():
  def refuse(constant):
    raise AssertionError(constant)

  for settings in (SamplingParams(), OTHER, SamplingParams(choices=('é', 'b'), guidance=1.5, negative_prompt='\udc80')):
    content = json.loads(json.dumps(manifest.settings_to_json(settings)), parse_constant=refuse)
    assert list(content) == [field.name for field in dataclasses.fields(SamplingParams)]
    assert manifest.settings_from_json(content, 'here') == settings
  assert manifest.settings_to_json(SamplingParams())['min_log_prob'] is None
  assert manifest.settings_from_json({}, 'here') == SamplingParams()


def test_a_manifest_holds_what_it_takes(trained, made):
  header, *rows = [json.loads(line) for line in made.read_text().splitlines()]
  writer = generator.Generator.load(trained)
  assert header['checkpoint'] == {'step': writer.step, 'params_sha256': manifest.params_sha256(writer.params)}
  assert header['tokenizer_sha256'] == writer.tokenizer.fingerprint()
  assert set(header['versions']) == {'python', 'jax', 'jaxlib', 'flax', 'numpy', 'textgen_jax'}
  assert (header['versions']['jax'], header['batch_size']) == (jax.__version__, 3)
  assert [one['seed'] for one in header['settings']] == [3]
  assert [row['prompt'] for row in rows] == [prompt for prompt in PROMPTS for _ in range(2)]
  assert all(len(row['log_probs']) == len(row['tokens']) for row in rows)
  assert str(trained) not in made.read_text()
  texts = ''.join(f'{row["prompt"]}{row["text"]}\n---\n' for row in rows)
  assert (made.parent / 'out.txt').read_text() == texts.removesuffix('---\n')


def test_settings_of_each_prompt(trained):
  writer = generator.Generator.load(trained)
  other = dataclasses.replace(OTHER, seed=3)
  settings = [other, SamplingParams(max_new_tokens=2), other]
  with pytest.raises(ValueError, match='nothing was generated yet'):
    writer.manifest()
  made = writer.generate(['a', 'sea', 'the'], settings, batch_size=2)
  header, *rows = [json.loads(line) for line in writer.manifest()]
  assert (header['batch_size'], len(header['settings']), header['transforms']) == (2, 2, [])
  assert [row.pop('settings') for row in rows] == [0, 0, 1, 0, 0]
  assert rows == json.loads(json.dumps([one.row() for one in made]))


def test_a_manifest_is_of_what_was_given_last(trained, tmp_path):
  def louder(logits_BV, history):
    return logits_BV * 2

  writer = generator.Generator.load(trained)
  transforms = [louder]
  made = writer.generate(['a', 'sea'], SamplingParams(max_new_tokens=3), batch_size=1, transforms=transforms)
  lines = writer.manifest()
  assert 'louder' in json.loads(lines[0])['transforms'][0]
  made.pop()
  transforms.clear()
  with pytest.raises(errors.UserError):
    writer.generate(['Zoo'])
  assert writer.manifest() == lines
  writer.generate_to(tmp_path / 'out.jsonl', ['the'], SamplingParams(max_new_tokens=3))
  header, row = map(json.loads, writer.manifest())
  assert (row['prompt'], header['batch_size'], header['transforms']) == ('the', 64, [])


def test_other_parameters_have_another_hash(trained, monkeypatch):
  hashed, real = [], manifest.params_sha256
  monkeypatch.setattr(manifest, 'params_sha256', lambda params: (hashed.append(params), real(params))[1])
  writer = generator.Generator.load(trained, draft=trained)
  own, draft = writer.params, writer.draft.params
  short = SamplingParams(max_new_tokens=2)

  def told():
    header = json.loads(writer.manifest()[0])
    return header['checkpoint']['params_sha256'], header['draft'].get('params_sha256')

  for _ in range(2):
    writer.generate(['a'], short)
    assert told() == (real(own), real(draft))
  assert [id(tree) for tree in hashed] == [id(own), id(draft)]
  writer.params = jax.tree.map(lambda x: x * 1.5, own)
  assert told() == (real(own), real(draft))  # which these texts were made with
  writer.generate(['a'], short)
  assert told() == (real(writer.params), real(draft)) != (real(own), real(draft))
  writer.draft = writer.draft._replace(params=own)
  writer.generate(['a'], short)
  assert told() == (real(writer.params), real(own))
  writer.draft = None
  writer.generate(['a'], short)
  assert told() == (real(writer.params), None)
  assert len({id(tree) for tree in hashed}) == 3
  assert len(writer._hashes) <= 2  # a tree that nobody uses is let go of


def test_a_new_process_writes_every_byte_again(trained, made, tmp_path):
  argv = [sys.executable, 'sample.py', f'--workdir={trained}', f'--reproduce={made}', f'--output={tmp_path}/again.jsonl']
  done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
  assert (done.returncode, done.stdout) == (0, ''), done.stderr
  assert 'the same, every byte' in done.stderr
  assert (tmp_path / 'again.jsonl').read_bytes() == made.read_bytes()


def test_a_finished_journal_gives_the_same_manifest(capsys, trained, made, tmp_path):
  """With --output and jsonl the texts have been on the disk."""
  flags = ['--num_samples=2', '--max_new_tokens=12', '--seed=3', '--log_probs', '--alternatives=2', '--batch_size=3', '--stop=q']
  flags += [f'--prompts_file={made.parent}/prompts.txt', f'--output={tmp_path}/out.jsonl', '--format=jsonl', f'--manifest={tmp_path}/m']
  assert sample.main(['sample.py', f'--workdir={trained}', *flags]) == 0
  assert (tmp_path / 'm').read_bytes() == made.read_bytes()
  assert 'texts: 10' in capsys.readouterr().err


def test_what_differs_is_told(capsys, trained, made, tmp_path):
  def other_text(row):
    row['text'] += '!'

  path = edited(made, tmp_path, other_text, line=4)
  code, out, err = reproduce(capsys, trained, path)
  assert (code, out.encode()) == (5, made.read_bytes())
  assert f'{str(path)!r}, line 5: ' in err

  def other_machine(header):
    header['versions']['jax'], header['platform']['count'] = '0.0.1', 8

  code, out, err = reproduce(capsys, trained, edited(made, tmp_path, other_machine))
  assert (code, out.encode()) == (0, made.read_bytes())
  assert f'versions.jax=0.0.1, now {jax.__version__}' in err
  assert 'platform.count=8, now ' in err
  assert 'the same, every text; the header tells of another machine' in err


def test_another_checkpoint_or_tokenizer_is_refused(trained, made, monkeypatch):
  monkeypatch.setattr(generator.generate, 'complete', None)  # nothing is made
  writer, wanted = generator.Generator.load(trained), manifest.read(made)
  trembling = jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(1e-6), writer.params)
  retokenized = char.CharTokenizer.train(base.TokenizerConfig(), ['another text'])
  for params, tokenizer, old, new in [
    (trembling, writer.tokenizer, wanted.header['checkpoint']['params_sha256'], manifest.params_sha256(trembling)),
    (writer.params, retokenized, wanted.header['tokenizer_sha256'], retokenized.fingerprint()),
  ]:
    with pytest.raises(errors.UserError) as caught:
      generator.Generator(writer.model, params, tokenizer, writer.step).reproduce(wanted)
    assert old[:12] in str(caught.value)
    assert new[:12] in str(caught.value)
  with pytest.raises(errors.UserError, match='transforms'):
    writer.reproduce(wanted, transforms=[lambda logits_BV, history: logits_BV])


def test_hashes_tell_name_shape_type_and_bytes():
  x = np.zeros((2, 3), np.float32)
  trees = [{'a': x}, {'b': x}, {'a': x.T}, {'a': x.astype(np.int32)}, {'a': -x}, {'a': jnp.zeros((2, 3), jnp.bfloat16)}, {'a': x, 'b': x}]
  assert len({manifest.params_sha256(tree) for tree in trees}) == len(trees)
  assert manifest.params_sha256({'a': jnp.asarray(x)}) == manifest.params_sha256({'a': x})


def setting(name, value):
  return lambda header: header['settings'][0].update({name: value})


@pytest.mark.parametrize(
  ('change', 'line', 'parts'),
  [
    (lambda header: b'words\n', 0, ['line 1', 'JSON']),
    (lambda header: b'[]\n', 0, ['line 1', 'not an object']),
    (lambda header: b'\xff\n', 0, ['line 1', 'UTF-8']),
    (lambda header: b'[' * 100_000 + b'\n', 0, ['line 1', 'JSON']),
    (lambda header: {'prompt': 'a'}, 0, ['format=None']),
    (lambda header: header.update(format=2), 0, ['format=2 is not 1']),
    (lambda header: header.update(format=True), 0, ['format=True']),
    (lambda header: header.update(batch_size=0), 0, ['batch_size=0']),
    (lambda header: header.update(batch_size='8'), 0, ["batch_size='8'", 'int']),
    (lambda header: header.update(sttings=[]), 0, ['sttings', "did you mean 'settings'?"]),
    (lambda header: header.update(checkpoint={}), 0, ['params_sha256']),
    (lambda header: header['checkpoint'].pop('step') and None, 0, ['checkpoint.step', 'no step']),
    (lambda header: header['checkpoint'].update(step=-1), 0, ['checkpoint.step=-1']),
    (lambda header: header['checkpoint'].update(step=None), 0, ['no step']),
    (lambda header: header['checkpoint'].update(step=5), 0, ["checkpoint='5'", '6']),
    (lambda header: header['checkpoint'].update(params_sha256='f00d' * 16), 0, ['checkpoint', 'f00df00df00d']),
    (lambda header: header.update(tokenizer_sha256='f00d' * 16), 0, ['tokenizer', 'f00df00df00d']),
    (lambda header: header.update(transforms=['louder']), 0, ['louder']),
    (lambda header: header.update(settings=[]), 0, ['line 2', 'settings=0']),
    (lambda header: header.update(settings=[3]), 0, ['settings 0', '3 is not an object']),
    (setting('temprature', 1.0), 0, ['temprature', "did you mean 'temperature'?"]),
    (setting('temperature', -1.0), 0, ['settings 0', 'temperature=-1.0']),
    (setting('temperature', math.nan), 0, ['NaN is not JSON']),
    (setting('temperature', None), 0, ['temperature=-inf']),
    (setting('top_p', '1'), 0, ["top_p='1'", 'type']),
    (setting('top_k', True), 0, ['top_k=True', 'type']),
    (setting('seed', 10**30), 0, ['seed=1000']),
    (setting('temperature', 10**400), 0, ['temperature=1000', 'type']),
    (setting('stop', 'q'), 0, ["stop='q'", 'type']),
    (setting('logit_bias', [[1, 2, 3]]), 0, ['logit_bias', 'type']),
    (setting('stop_regex', '('), 0, ['stop_regex']),
    (setting('num_samples', 3), 0, ['line 2', 'num_samples=3']),
    (lambda row: b'\n', 4, ['line 5', 'JSON']),
    (lambda row: row.update(prompt=3), 3, ['line 4', 'prompt=3']),
    (lambda row: row.update(prompt='b'), 4, ['line 4', 'num_samples=2']),
    (lambda row: row.update(settings=1), 3, ['line 4', 'settings=1']),
    (lambda row: row.update(settings=-1), 3, ['line 4', 'settings=-1']),
    (lambda row: b'', 10, ['line 10', 'num_samples=2']),
    (lambda row: b'{"prompt": "a', 10, ['line 11', 'JSON']),
  ],
)
def test_damaged_manifests(capsys, trained, made, tmp_path, change, line, parts):
  code, out, err = reproduce(capsys, trained, edited(made, tmp_path, change, line))
  assert (code, out, len(err.splitlines())) == (2, '', 1), err
  assert err.startswith('error: ')
  assert len(err) < 1000
  assert all(part in err for part in parts), err


def test_files_that_are_none(capsys, trained, tmp_path):
  (tmp_path / 'empty').touch()
  os.mkfifo(tmp_path / 'pipe')
  with (tmp_path / 'huge').open('wb') as file:
    file.truncate(manifest.MAX_BYTES + 1)
  for name, part in [('empty', 'empty'), ('pipe', 'regular'), ('huge', 'too large'), ('nowhere', 'No such file')]:
    code, out, err = reproduce(capsys, trained, tmp_path / name)
    assert (code, out, len(err.splitlines())) == (2, '', 1)
    assert part in err


@pytest.mark.parametrize('flag', ['--temperature=1', '--prompt=a', '--checkpoint=latest', '--manifest=new', '--format=jsonl', '--stream'])
def test_nothing_else_goes_with_reproduce(capsys, trained, made, flag):
  code, _, err = reproduce(capsys, trained, made, flag)
  assert code == 2
  assert f'drop {flag.partition("=")[0]}' in err


@pytest.mark.parametrize(
  ('flags', 'part'),
  [
    (['--manifest=/tmp'], "manifest='/tmp' is a directory"),
    (['--manifest=/nowhere/m'], 'its directory does not exist'),
    (['--manifest={new}', '--output={new}'], 'name two files'),
    (['--manifest={new}', '--stream'], '--stream'),
    (['--batch_size=0'], 'batch_size=0'),
    (['--manifest={new}/'], 'is a directory'),
    (['--manifest='], 'manifest is empty: name a file'),
    (['--reproduce='], 'reproduce is empty: name a file'),
  ],
)
def test_wrong_flags(capsys, trained, tmp_path, flags, part):
  capsys.readouterr()
  assert sample.main(['sample.py', f'--workdir={trained}', *(flag.format(new=tmp_path / 'new') for flag in flags)]) == 2
  assert part in capsys.readouterr().err
  assert list(tmp_path.iterdir()) == []


def test_a_manifest_without_texts(capsys, trained, made, tmp_path):
  (tmp_path / 'head.jsonl').write_bytes(made.read_bytes().splitlines(keepends=True)[0])
  code, _, err = reproduce(capsys, trained, tmp_path / 'head.jsonl')
  assert code == 2
  assert 'holds no text' in err
