import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from textgen_jax import errors, trees
from textgen_jax.training import checkpoints, optimizer, state

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
ABOUT = {'experiment': {'seed': 3}, 'tokenizer': {'tokenizer.json': {'characters': 'aé😀'}}}


def make(seed=0, carry=True, step=5):
  """A state of every dtype in use, with the numbers that a cast or a print would lose."""
  rng = np.random.default_rng(seed)
  odd = np.array([-0.0, np.nan, np.inf, 1e-45, 1 / 3, 16777217.0], np.float32)
  params = {
    'embed': {'embedding': jnp.asarray(rng.standard_normal((4, 3)), jnp.float32)},
    'block_0': {'kernel': jnp.asarray(odd), 'scale': jnp.asarray(rng.standard_normal(5), jnp.bfloat16)},
  }
  tx = optimizer.build(optimizer.OptimizerConfig(schedule_steps=10, warmup_steps=2))
  opt_state = jax.tree.map(lambda x: x + jnp.asarray(7, x.dtype), tx.init(params))
  count = jnp.asarray(step, jnp.int32)
  rows = {'hidden': jnp.asarray(rng.standard_normal((2, 3)), jnp.float32)} if carry else None
  return state.TrainState(count, count - 1, jnp.array([1, 2**32 - 1], jnp.uint32), params, opt_state, rows)


def abstract(tree):
  return checkpoints.with_shardings(tree, jax.tree.map(lambda _: HERE, tree))


def assert_bitwise(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (name, x), (_, y) in zip(trees.named_leaves(a), trees.named_leaves(b), strict=True):
    assert (x.dtype, x.shape) == (y.dtype, y.shape), name
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name


def save(kept, step, val_loss, **options):
  kept.save(step, make(step, step=step, **options), ABOUT, val_loss)


@pytest.mark.parametrize('carry', [True, False])
def test_round_trip_is_bitwise(carry, tmp_path):
  kept = checkpoints.Checkpoints(tmp_path)
  before = make(carry=carry)
  kept.save(5, before, ABOUT, 1.25)
  kept.close()
  again = checkpoints.Checkpoints(tmp_path)
  assert_bitwise(again.restore(5, abstract(make(1, carry=carry, step=0))), before)
  assert again.about(5) == {'format': checkpoints.FORMAT, **ABOUT}
  assert again.val_loss(5) == 1.25
  assert again.latest_step() == again.best_step() == 5


def test_params_can_be_read_alone(tmp_path):
  kept = checkpoints.Checkpoints(tmp_path)
  before = make()
  kept.save(5, before, ABOUT, None)
  kept.close()
  # Neither moments nor carry are needed, not even their files.
  (state_files,) = (tmp_path / 'checkpoints').glob('5/state')
  for path in sorted(state_files.rglob('*'), reverse=True):
    path.rmdir() if path.is_dir() else path.unlink()
  reader = checkpoints.Checkpoints(tmp_path, read_only=True)
  assert_bitwise(reader.restore_params(5, abstract(make(1).params)), before.params)
  with pytest.raises(errors.NoGoodCheckpoint, match='checkpoints/5'):
    reader.restore(5, abstract(before))


def test_the_latest_and_the_best_are_kept(tmp_path):
  kept = checkpoints.Checkpoints(tmp_path, keep_latest=2)
  found = []
  for step, val_loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, 0.5), (6, 4.0), (7, 4.0), (8, 4.0)):
    save(kept, step, val_loss)
    kept.wait()
    found.append((kept.steps(), kept.best_step()))
  assert found == [
    ([1], 1), ([1, 2], 2), ([2, 3], 2), ([2, 3, 4], 2), ([4, 5], 5), ([5, 6], 5), ([5, 6, 7], 5), ([5, 7, 8], 5)
  ]  # fmt: skip
  assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir() if path.is_dir()) == ['5', '7', '8']
  again = checkpoints.Checkpoints(tmp_path, keep_latest=2)  # what was best is read back
  assert (again.best_step(), again.val_loss(5), again.val_loss(8)) == (5, 0.5, 4.0)
  save(again, 9, 3.0)
  again.wait()
  assert again.steps() == [5, 8, 9]


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), float('-inf'), None])
def test_a_loss_that_is_not_finite_or_missing_is_never_the_best(bad, tmp_path):
  kept = checkpoints.Checkpoints(tmp_path)
  save(kept, 1, bad)
  kept.wait()
  assert kept.best_step() is None
  assert kept.val_loss(1) is None
  for step, val_loss in ((2, 1.0), (3, bad), (4, bad)):
    save(kept, step, val_loss)
    kept.wait()
  assert (kept.steps(), kept.best_step(), kept.latest_step()) == ([2, 4], 2, 4)
  kept.close()
  assert checkpoints.Checkpoints(tmp_path, read_only=True).best_step() == 2


def test_of_two_equals_the_one_that_is_kept_is_the_best(tmp_path):
  kept = checkpoints.Checkpoints(tmp_path)
  for step, val_loss in ((1, 2.0), (2, 2.0), (3, 4.0)):
    save(kept, step, val_loss)
    kept.wait()
  assert (kept.steps(), kept.best_step()) == ([2, 3], 2)


@pytest.mark.parametrize('finish', ['wait', 'close'])
def test_the_last_save_is_on_disk(finish, tmp_path):
  kept = checkpoints.Checkpoints(tmp_path)
  before = make()
  kept.save(5, before, ABOUT, None)
  getattr(kept, finish)()
  names = [path.name for path in (tmp_path / 'checkpoints').iterdir()]
  assert names == ['5']  # nothing half-written is left
  assert_bitwise(checkpoints.Checkpoints(tmp_path, read_only=True).restore(5, abstract(before)), before)


def test_a_save_does_not_see_what_happens_to_the_state_after_it(tmp_path):
  kept = checkpoints.Checkpoints(tmp_path)
  before = make()
  copy = jax.tree.map(jnp.array, before)
  kept.save(5, before, ABOUT, None)
  jax.tree.map(lambda x: x.delete(), before)  # as the next step's donation does
  kept.close()
  assert_bitwise(checkpoints.Checkpoints(tmp_path).restore(5, abstract(copy)), copy)


def test_reading_makes_and_removes_nothing(tmp_path):
  kept = checkpoints.Checkpoints(tmp_path)
  for step in (1, 2, 3):
    save(kept, step, 1.0 / step)
  kept.close()
  half = tmp_path / 'checkpoints' / '4.orbax-checkpoint-tmp'
  half.mkdir()
  before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob('*'))
  reader = checkpoints.Checkpoints(tmp_path, keep_latest=1, read_only=True)
  assert reader.steps() == [3]
  reader.restore_params(3, abstract(make().params))
  assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob('*')) == before
  writer = checkpoints.Checkpoints(tmp_path)  # one that writes clears up after a killed process, before its first save
  save(writer, 4, 1.0)
  writer.close()
  assert not half.exists()


def test_another_shape_or_a_damaged_file_is_no_good_checkpoint(tmp_path):
  kept = checkpoints.Checkpoints(tmp_path)
  before = make()
  kept.save(5, before, ABOUT, None)
  kept.close()
  wrong = dataclasses.replace(before, params={**before.params, 'more': jnp.ones(2)})
  with pytest.raises(errors.NoGoodCheckpoint, match='checkpoints/5: the checkpoint could not be read'):
    checkpoints.Checkpoints(tmp_path).restore(5, abstract(wrong))
  (tmp_path / 'checkpoints' / '5' / 'params' / '_METADATA').write_text('{')
  with pytest.raises(errors.NoGoodCheckpoint, match='checkpoints/5: the checkpoint could not be read'):
    checkpoints.Checkpoints(tmp_path).restore(5, abstract(before))


def test_a_step_that_was_half_deleted_does_not_stop_the_next_run(tmp_path):
  # A process killed while it deletes an old step leaves part of it, under its final name.
  kept = checkpoints.Checkpoints(tmp_path, keep_latest=3)
  for step in (1, 2, 3):
    save(kept, step, None if step == 2 else 3.0 + step)
  kept.close()
  for part in ('metrics', 'about', 'params'):
    for path in sorted((tmp_path / 'checkpoints' / '1' / part).rglob('*'), reverse=True):
      path.rmdir() if path.is_dir() else path.unlink()
  again = checkpoints.Checkpoints(tmp_path)
  assert again.latest_step() == 3
  assert again.best_step() == 3
  save(again, 4, 9.0)
  again.close()
  assert checkpoints.Checkpoints(tmp_path, read_only=True).steps() == [3, 4]


def test_files_travel_by_name(tmp_path):
  files = {'tokenizer.json': {'characters': 'aé😀'}, 'more.json': [1, 2]}
  checkpoints.write_files(tmp_path / 'a', files)
  assert json.loads((tmp_path / 'a' / 'tokenizer.json').read_text(encoding='utf-8')) == files['tokenizer.json']
  assert checkpoints.read_files(tmp_path / 'a') == files
  for name in ('../outside.json', '/outside.json', 'a/b.json'):
    with pytest.raises(errors.NoGoodCheckpoint, match='lies elsewhere'):
      checkpoints.write_files(tmp_path / 'b', {name: {}})
  assert not (tmp_path / 'outside.json').exists()


@pytest.mark.parametrize(('file', 'content'), [('metrics/metrics', '{'), ('about/metadata', '[]'), ('about/metadata', '{')])
def test_a_damaged_record_is_no_good_checkpoint(tmp_path, file, content):
  kept = checkpoints.Checkpoints(tmp_path)
  save(kept, 5, 1.0)
  kept.close()
  path = tmp_path / 'checkpoints/5' / file
  assert path.exists()
  path.write_text(content)
  with pytest.raises(errors.NoGoodCheckpoint):
    checkpoints.Checkpoints(tmp_path, read_only=True).about(5)
