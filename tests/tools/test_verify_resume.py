import random

import conftest
import numpy as np
import orbax.checkpoint as ocp
import pytest

from textgen_jax import errors
from textgen_jax.tools import verify_resume


@pytest.fixture(scope='module')
def quickly():
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
    patch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    yield


def configuration(text_file):
  tiny = ['--config.model.dim=16', '--config.training.batch_size=4', '--config.training.sequence_length=16']
  return [f'--config={conftest.CONFIGS}/debug.py', f'--config.data.path={text_file}', *tiny, '--config.training.sample_tokens=0']


def test_a_sound_run_is_found_to_be_so(quickly, capfd, text_file):
  argv = ['verify_resume', *configuration(text_file), '--kills=1', '--num_steps=40', '--seed=1']
  assert verify_resume.main(argv) == 0
  out, _ = capfd.readouterr()
  told = out.splitlines()
  assert told[0] == 'trained 40 steps without a break'
  assert told[1].startswith('killed while training, at step ')
  assert told[2:] == ['went on to step 40', 'every array of the last checkpoint and every logged loss are the same to the bit']


def test_a_run_that_keeps_something_in_the_process_is_found(quickly, capfd, text_file, tmp_path, monkeypatch):
  """Batches that are counted from where the process began."""
  broken = verify_resume.TRAIN.replace(
    'def main(argv):',
    """def main(argv):
  import itertools
  import numpy as np
  from textgen_jax.data import windows
  batch, count = windows.RandomWindows.batch, itertools.count()
  windows.RandomWindows.batch = lambda self, step, *rows: batch(self, next(count), *rows)
""",
  )
  monkeypatch.setattr(verify_resume, 'TRAIN', broken)
  settings = {'num_steps': 150, 'log_every_steps': 1, 'checkpoint_every_steps': 4, 'eval_every_steps': 0}
  runs = verify_resume.Runs([*configuration(text_file), *(f'--config.training.{name}={value}' for name, value in settings.items())])
  with pytest.raises(errors.RunError, match=r'the run that was killed is another one: params/\S+ differs in the checkpoints of step 150'):
    verify_resume.verify(runs, tmp_path, 1, 150, random.Random(4))


def test_a_run_that_fails_is_told_with_its_last_words(text_file, tmp_path):
  runs = verify_resume.Runs([*configuration(text_file), '--config.model.num_heads=3'])
  with pytest.raises(errors.RunError, match=r"exit code 2, and said: error: model\.dim=16 isn't divisible by model\.num_heads=3"):
    runs.finish(tmp_path / 'run')


@pytest.mark.parametrize(
  ('flag', 'said'),
  [
    ('--kills=0', '--kills=0 is below 1'),
    ('--num_steps=1', '--num_steps=1 is below 2'),
    ('--kils=3', 'did you mean --kills'),
    ('--config.model.dmi=3', 'did you mean model.dim'),
    ('--config.model.num_heads=3', "isn't divisible"),
  ],
)
def test_wrong_flags(flag, said, capsys, text_file):
  assert verify_resume.main(['verify_resume', *configuration(text_file), flag]) == 2
  out, err = capsys.readouterr()
  assert (out, len(err.splitlines())) == ('', 1)
  assert said in err


def write(workdir, step, kernel, losses):
  trees = {'params': {'kernel': kernel}, 'state': {'step': np.int32(step)}}
  for item, tree in trees.items():
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(workdir.absolute() / 'checkpoints' / str(step) / item, tree)
  (workdir / 'metrics.jsonl').write_text(''.join(f'{{"step": {n}, "train/loss": {loss}}}\n' for n, loss in losses))
  return workdir


def test_differences_by_one_bit(tmp_path):
  kernel = np.array([0.0, 1.0, np.nan], np.float32)
  losses = [(1, 2.5), (2, 2.25)]
  one = write(tmp_path / 'one', 2, kernel, losses)
  assert verify_resume.difference(one, write(tmp_path / 'same', 2, kernel, losses), 2) == ''
  others = {
    'negative zero': (kernel * [-1, 1, 1], losses, 'params/kernel differs'),
    'next': (np.nextafter(kernel, np.float32(2)), losses, 'params/kernel differs'),
    'loss': (kernel, [(1, 2.5), (2, 2.2500001)], 'the loss of step 2 was 2.25, and step 2 had 2.2500001'),
    'fewer': (kernel, losses[:1], '2 losses were logged, and 1'),
  }
  for name, (leaf, logged, said) in others.items():
    found = verify_resume.difference(one, write(tmp_path / name, 2, leaf.astype(np.float32), logged), 2)
    assert said in found, name
