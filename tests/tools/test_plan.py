"""tools.plan as scripts use it."""

import json

import conftest
import pytest

from textgen_jax.planning import ahead, devices
from textgen_jax.tools import plan

DEBUG = f'--config={conftest.CONFIGS}/debug.py'
LSTM = f'--config={conftest.CONFIGS}/lstm_gpu.py'
LARGE = f'--config={conftest.CONFIGS}/modern_1b.py'
FEWER = '--config.model.num_layers=4'  # so that traces are short


def run(capsys, *arguments):
  code = plan.main(['plan', *arguments])
  told = capsys.readouterr()
  assert len(told.err.splitlines()) == (code != 0)
  return code, told.out, told.err


def test_a_plan_that_fits(capsys):
  code, out, _ = run(capsys, LARGE, FEWER, '--topology=h100:8x1', '--format=json', '--tokens=1e9')
  told = json.loads(out)
  assert code == 0
  assert told['mesh'] == {'data': 1, 'fsdp': 8, 'tensor': 1}
  assert told['bytes']['peak'] < told['bytes']['memory'] == devices.DEVICES['h100'].memory_bytes
  assert told['time']['days'] == pytest.approx(1e9 / told['tokens_per_step'] * told['time']['step'] / 86_400)
  assert told['time']['mfu'] <= told['time']['efficiency']
  text = run(capsys, LARGE, FEWER, '--topology=h100:8x1')[1]
  mesh, parameters = '8 devices as data 1 x fsdp 8 x tensor 1', f'{told["parameters"]:,}'
  for said in (mesh, parameters, 'kernel blocks', 'all-gather', 'MFU', 'days'):
    assert said in text


@pytest.mark.parametrize(
  ('arguments', 'told'),
  [
    ([DEBUG], '--topology is missing'),
    ([DEBUG, '--topology=v5e:3x3'], "topology='v5e:3x3' is none of"),
    (['--topology=v5e:2x2'], '--config is missing'),
    ([DEBUG, '--topology=v5e:2x2', '--config.model.dims=3'], 'did you mean model.dim?'),
    ([DEBUG, '--topology=v5e:2x2', '--format=xml'], "format='xml' is none of text, json"),
    ([DEBUG, '--topology=v5e:2x2', '--tokens=-1'], 'tokens=-1 is below 0'),
    ([DEBUG, '--topology=v5e:2x2', f'--tokens={"9" * 400}'], 'is above 1e+18'),
    ([DEBUG, '--topology=v5e:2x2', '--tokens=1e99999'], 'tokens=1e99999 is above 1e+18'),
    ([DEBUG, '--topology=v5e:2x2', '--tokens=1.5'], 'tokens=1.5 is not a whole number'),
    ([DEBUG, '--topology=v5e:2x2', '--tokens=nan'], "tokens='nan' is not a number, such as 1000000000 or 1e9"),
    ([DEBUG, '--topology=v5e:2x2', '--tokens=٨'], 'is not a number, such as 1000000000 or 1e9'),
    ([DEBUG, '--topology=v5e:2x2', '--vocab_size=-1'], 'vocab_size=-1 is not in [0, 2**31)'),
    ([DEBUG, '--topology=v5e:2x2', '--vocab_size=2147483648'], 'vocab_size=2147483648 is not in [0, 2**31)'),
    ([DEBUG, '--topology=v5e:2x2', '--vocab_size=10'], "vocab_size=10 is not the 257 ids of tokenizer.kind='byte' (bytes)"),
    ([LARGE, '--topology=v5e:2x2', '--vocab_size=50257'], "tokenizer.kind='sentencepiece' (tokenizer.vocab_size=32000)"),
    ([DEBUG, '--topology=v5e:2x2', '--config.tokenizer.kind=char', '--vocab_size=1'], 'vocab_size=1 is below 2'),
    ([DEBUG, '--topology=v5e:2x2', '--config.tokenizer.kind=char', '--vocab_size=2147483647', '--config.model.vocab_multiple=8'],
     'vocab_size=2147483647, padded to a multiple of model.vocab_multiple=8, is not below 2**31'),
    ([DEBUG, '--topology=h100:1x1', '--config.model.dim=36', '--config.model.attention_kernel=cudnn'],
     "model.attention_kernel='cudnn': the head dim must be <= 256 and a multiple of 8, but got 18"),
    ([DEBUG, '--topology=v5e:1x1', '--config.model.attention_kernel=cudnn'],
     "model.attention_kernel='cudnn': it needs an NVIDIA GPU, and the topology is of tpus"),
    ([LSTM, '--topology=h100:1x1', '--config.model.dim=36', '--config.model.recurrence_kernel=triton'],
     "model.recurrence_kernel='triton': model.dim=36 is not divisible by 8"),
    ([DEBUG, '--topology=cpu:1', '--compile', '--format=json', '--config.training.batch_size=2147483647',
      '--config.training.sequence_length=2147483647'], '--compile for cpu:1: the step takes '),
    ([DEBUG, '--topology=v5e:2x2', '--config.tokenizer.kind=char'], "--vocab_size is missing: tokenizer.kind='char'"),
    ([DEBUG, '--topology=v5e:4x4', '--config.training.batch_size=24'], 'the 16 devices that rows are split over'),
    ([DEBUG, '--topology=h100:8x1', '--config.sharding.fsdp=3'], "8 devices aren't divisible by sharding sizes"),
  ],
)  # fmt: skip
def test_wrong_input_is_one_line(arguments, told, capsys):
  code, _, err = run(capsys, *arguments)
  assert code == 2
  assert told in err


def advised(err):
  """What an error line says would fit: the flags of each way, the first of several."""
  first = err.partition('would fit with: ')[2].strip().split('; or ')[0]
  return [one if one.startswith('--') else f'--config.{one}' for one in first.split(', ')]


@pytest.mark.parametrize(
  ('changes', 'ways'),
  [
    (['--topology=h100:8x1', '--config.training.accumulation_steps=2', '--config.model.num_layers=8'],
     ['model.remat=', 'training.accumulation_steps=']),
    (['--topology=v5e:2x4', '--config.sharding.data=-1', '--config.sharding.fsdp=1', '--config.training.accumulation_steps=128',
      '--config.model.num_layers=16'], ['sharding.fsdp=']),
    (['--topology=v5e:1x1', '--config.model.num_layers=8', '--config.model.dim=4096'], ['--topology=v5e:']),
  ],
)  # fmt: skip
def test_what_would_fit_does(changes, ways, capsys):
  arguments = [LARGE, *changes]
  code, out, err = run(capsys, *arguments)
  assert code == 2
  assert "error: doesn't fit: " in err
  assert 'GiB on each device; would fit with: ' in err
  assert out  # the plan is told all the same
  for way in ways:
    assert way in err
  given = advised(err)
  rest = [one for one in arguments if not any(one.startswith(flag.partition('=')[0] + '=') for flag in given)]
  assert run(capsys, *rest, *given)[0] == 0


@pytest.mark.parametrize('form', ['text', 'json'])
def test_the_plan_is_told_before_it_is_compiled(form, capsys, monkeypatch):
  before = []

  def compile_step(*args):
    before.append(capsys.readouterr())
    return ahead.Compiled(10**6, 1.0, {}, 0)

  monkeypatch.setattr(ahead, 'compile_step', compile_step)
  assert plan.main(['plan', DEBUG, '--topology=v5e:1x1', '--compile', f'--format={form}']) == 0
  (early,), late = before, capsys.readouterr()
  assert (early.err, late.err) == ('compiling for v5e:1x1\n', '')
  if form == 'text':
    assert 'training ' in early.out
    assert late.out.startswith('compiled     in 1 s')
  else:
    assert early.out == ''
    assert json.loads(late.out)['compiled']['peak_bytes'] == 10**6


def test_help(capsys):
  assert run(capsys, '--help')[0] == 0
