"""What several test files share: a cache of their own, a small text, tiny trained workdirs."""

import json
import pathlib

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

import train
from textgen_jax.training import integrity

TINY = [
  '--config.tokenizer.kind=char',
  '--config.model.dim=16',
  '--config.model.num_layers=1',
  '--config.training.batch_size=4',
  '--config.training.sequence_length=16',
  '--config.training.num_steps=6',
  '--config.training.log_every_steps=2',
  '--config.training.eval_every_steps=3',
  '--config.training.checkpoint_every_steps=2',
  '--config.training.sample_tokens=0',
]
CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'


# One device whichever test comes first: train.py would make one of each core, and what it runs then rounds otherwise.
jax.config.update('jax_num_cpu_devices', 1)


@pytest.fixture(scope='session', autouse=True)
def cache(tmp_path_factory):
  """No test touches the user's cache."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('TEXTGEN_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
    yield


@pytest.fixture(scope='session')
def text_file(tmp_path_factory):
  """About 6,000 characters of made-up lines, with no Z among them."""
  words = 'the king and his fool went over hill field to see a ship of war come home from sea'.split()
  lines = [' '.join(words[(i * j) % len(words)] for j in range(3, 9)) + '.' for i in range(1, 180)]
  path = tmp_path_factory.mktemp('text') / 'tale.txt'
  path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
  return path


@pytest.fixture(scope='module')
def quickly(tmp_path_factory):
  """Runs in this process compile quickly, and once for all that share a program."""
  values = {
    'jax_disable_most_optimizations': True,
    'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('xla')),
    'jax_persistent_cache_min_compile_time_secs': 0.0,
  }
  old = {name: jax.config.values[name] for name in values}
  for name, value in values.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()  # JAX opens one when it first compiles, and keeps it
  yield
  for name, value in old.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope='module', autouse=True)
def let_go_of_what_was_compiled():
  """Each program takes memory maps, of which a process may have 65,530: the whole suite's don't fit."""
  yield
  jax.clear_caches()


def train_argv(workdir, text_file, *more, config='debug'):
  return ['train.py', f'--config={CONFIGS}/{config}.py', f'--workdir={workdir}', f'--config.data.path={text_file}', *TINY, *more]


def change_about(workdir, **values):
  """Makes a workdir's checkpoints say something else of themselves, as whole as before."""
  for path in (workdir / 'checkpoints').glob('*/about/metadata'):
    path.write_text(json.dumps(json.loads(path.read_bytes()) | values))
    integrity.seal(path.parent.parent, path.parent.parent.name)


@pytest.fixture(scope='session')
def trained(tmp_path_factory, text_file, cache):
  """A workdir that holds a finished run of a tiny Transformer. Not to be changed."""
  workdir = tmp_path_factory.mktemp('runs') / 'trained'
  assert train.main(train_argv(workdir, text_file)) == 0
  return workdir
