"""tools.plan as scripts use it."""

import json

import conftest
import pytest

from textgen_jax.planning import devices
from textgen_jax.tools import plan

DEBUG = f'--config={conftest.CONFIGS}/debug.py'
LARGE = f'--config={conftest.CONFIGS}/modern_1b.py'
FEWER = '--config.model.num_layers=4'  # so that traces are short


def run(capsys, *arguments):
  code = plan.main(['plan', *arguments])
  told = capsys.readouterr()
  assert len(told.err.splitlines()) == (code != 0)
  return code, told.out, told.err


def test_a_plan_that_fits(capsys):
  code, out, _ = run(capsys, LARGE, FEWER, '--topology=h100:8x1', '--format=json', '--tokens=1000000000')
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
    ([DEBUG, '--topology=v5e:2x2', '--config.tokenizer.kind=char'], "--vocab_size is missing: tokenizer.kind='char'"),
    ([DEBUG, '--topology=v5e:4x4', '--vocab_size=99', '--config.training.batch_size=24'], 'the 16 devices that rows are split over'),
    ([DEBUG, '--topology=h100:8x1', '--vocab_size=99', '--config.sharding.fsdp=3'], "8 devices aren't divisible by sharding sizes"),
  ],
)
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


def test_help(capsys):
  assert run(capsys, '--help')[0] == 0
