"""What a step takes, what takes less, and what is told where memory doesn't do."""

import pathlib

import jax
import pytest

from textgen_jax import assembly, errors, memory, trainer
from textgen_jax import experiment as experiment_lib
from textgen_jax.data import corpora
from textgen_jax.models import lstm, transformer
from textgen_jax.text import base
from textgen_jax.training import evaluate, step

pytestmark = pytest.mark.usefixtures('quickly')
TOLD = 'RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4.00GiB.\nBufferAssignment OOM Debugging.'


@pytest.fixture
def make(tmp_path_factory, text_file):
  def make(model=None, **training):
    settings = {'batch_size': 8, 'sequence_length': 32, 'num_steps': 2, 'sample_tokens': 0}
    return experiment_lib.Experiment(
      data=corpora.DataConfig(path=str(text_file)),
      tokenizer=base.TokenizerConfig(kind='char'),
      model=model or transformer.TransformerConfig(dim=16, num_layers=3, num_heads=2),
      training=experiment_lib.TrainingConfig(**(settings | training)),
    )

  return make


def assemble(experiment):
  return assembly.Parts(experiment, pathlib.Path('nowhere'), step.no_hook)


def test_accumulation_takes_less(make):
  """Of compiled programs."""
  parts = [assemble(make()), assemble(make(accumulation_steps=2))]
  plain, accumulated = (memory.peak_bytes(one.step.lower(one.abstract, *one.inputs([0])).compile()) for one in parts)
  state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(parts[0].abstract))
  assert plain > state + 3 * 8 * 32 * (16 * 4 + 64) * 4  # of each layer at least the inputs of its products
  assert accumulated - state < 0.8 * (plain - state)


def test_remat_keeps_less_for_the_backward_pass(make):
  """Of what is kept, whatever a backend makes of it."""

  def kept(remat):
    model = transformer.TransformerConfig(dim=16, num_layers=3, num_heads=2, remat=remat)
    parts = assemble(make(model))
    key = jax.random.PRNGKey(0)

    def residuals(params, batch):
      return jax.vjp(lambda params: step.loss_terms(parts.model, step.no_hook, params, None, batch, key).loss, params)[1]

    shapes = jax.eval_shape(residuals, parts.abstract.params, parts.windows.batch(0))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))

  assert kept('full') < 0.5 * kept('none')


@pytest.mark.parametrize(
  ('model', 'training', 'advice'),
  [
    (None, {'accumulation_steps': 2, 'batch_size': 12}, "model.remat='full' or training.accumulation_steps=3 would need less"),
    (transformer.TransformerConfig(remat='full'), {}, 'training.accumulation_steps=2 would need less'),
    (lstm.LSTMConfig(), {}, 'training.accumulation_steps=2 would need less'),
    (lstm.LSTMConfig(), {'accumulation_steps': 8}, 'a smaller model.dim or training.sequence_length would need less'),
  ],
)
def test_advice_is_of_what_is_left_to_do(model, training, advice, make, monkeypatch):
  parts = assemble(make(model, **training))
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert memory.smaller(parts) == advice
  monkeypatch.setattr(jax, 'default_backend', lambda: 'cpu')
  assert 'remat' not in memory.smaller(parts)


def test_a_peak_above_the_device_is_told(make, tmp_path, monkeypatch, capfd):
  monkeypatch.setattr(memory, 'limit_bytes', lambda: 2**20 // 8)
  trainer.train(make(lstm.LSTMConfig(dim=16, num_layers=1)), tmp_path)
  told = [line for line in capfd.readouterr().err.splitlines() if 'less than that peak' in line]
  assert told == ['a device has 0.1 MiB, which is less than that peak: training.accumulation_steps=2 would need less']


@pytest.mark.parametrize(
  ('owner', 'name', 'advice'),
  [
    (trainer._Trainer, 'compiled', 'training.accumulation_steps=2 would need less'),
    (trainer._Trainer, 'read', 'training.accumulation_steps=2 would need less'),
    (evaluate, 'evaluate', 'a smaller training.eval_batch_size would need less'),
  ],
)
@pytest.mark.parametrize('error', [RuntimeError(TOLD), MemoryError()])
def test_no_memory_left_is_one_line_that_says_what_to_do(owner, name, advice, error, make, tmp_path, monkeypatch):
  def fail(*args, **kwargs):
    raise error

  monkeypatch.setattr(owner, name, fail)
  said = TOLD.splitlines()[0] if error.args else 'MemoryError'
  with pytest.raises(errors.MachineFailed) as caught:
    trainer.train(make(lstm.LSTMConfig(dim=16, num_layers=1)), tmp_path)
  assert str(caught.value) == f'out of memory: {said}; {advice}'
  assert caught.value.exit_code == 5


def test_another_error_stays_what_it_is(make, tmp_path, monkeypatch):
  def fail(*args, **kwargs):
    raise RuntimeError('INTERNAL: a bug')

  monkeypatch.setattr(trainer._Trainer, 'compiled', fail)
  with pytest.raises(RuntimeError, match='INTERNAL: a bug'):
    trainer.train(make(lstm.LSTMConfig(dim=16, num_layers=1)), tmp_path)
