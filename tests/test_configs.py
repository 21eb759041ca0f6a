"""Every config gives an experiment that holds together and whose JSON says all of it."""

import json

import conftest
import jax
import pytest
from flax import linen as nn

from textgen_jax import command_line, trees
from textgen_jax import experiment as experiment_lib
from textgen_jax.models import build

PATHS = sorted(conftest.CONFIGS.glob('*.py'))


@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
def test_config(path):
  experiment = command_line.load_config(str(path))
  experiment_lib.check(experiment)
  content = json.loads(json.dumps(experiment_lib.to_json(experiment)))
  assert experiment_lib.from_json(content, 'x') == experiment
  assert experiment_lib.differences(experiment, experiment_lib.from_json(content, 'x')) == {}
  assert f'configs/{path.name} --workdir=' in path.read_text()


def test_what_was_stored_before_attention_had_a_dropout_of_its_own_is_read():
  experiment = experiment_lib.Experiment(model=build.CONFIGS['transformer'](dropout=0.2, attention_dropout=0.1))
  content = experiment_lib.to_json(experiment)
  assert experiment_lib.from_json(content, 'stored').model.attention_dropout == 0.1
  del content['model']['attention_dropout']
  assert experiment_lib.from_json(content, 'stored').model.attention_dropout == 0.2


@pytest.mark.parametrize(('stored', 'remat'), [(False, 'none'), (True, 'full')])
def test_what_was_stored_before_remat_was_a_name_is_read(stored, remat):
  experiment = command_line.load_config(f'{conftest.CONFIGS}/debug.py')
  content = experiment_lib.to_json(experiment)
  content['model']['remat'] = stored
  experiment.model.remat = remat
  assert experiment_lib.from_json(content, 'x') == experiment


@pytest.mark.parametrize(
  ('name', 'vocab_size', 'low', 'high'),
  [
    ('gpt2_124m', 256, 124.3e6, 124.5e6),
    ('tiny_shakespeare_nanogpt_gpu', 65, 10.6e6, 10.8e6),
    ('tiny_shakespeare_nanogpt_cpu', 65, 0.79e6, 0.82e6),
  ],
)
def test_sizes_are_the_published_ones(name, vocab_size, low, high):
  experiment = command_line.load_config(f'{conftest.CONFIGS}/{name}.py')
  model = build.build(experiment.model, vocab_size, experiment.training.sequence_length)
  shapes = jax.eval_shape(lambda: nn.unbox(model.init(jax.random.PRNGKey(0), jax.numpy.zeros((1, 2), int), method='init_everything')))
  assert low < trees.count(shapes) < high
