import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from textgen_jax import errors, trees
from textgen_jax.training import checkpoints, health, integrity, optimizer, state

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
  return state.TrainState(
    step=count,
    updates=count - 1,
    data_offset=count + 3,
    root_key=jnp.array([1, 2**32 - 1], jnp.uint32),
    health=health.fresh().replace(loss_mean=jnp.float32(1 / 3)),
    params=params,
    trained=None,
    opt_state=opt_state,
    carry=rows,
  )


def abstract(tree):
  return checkpoints.with_shardings(tree, jax.tree.map(lambda _: HERE, tree))


def assert_bitwise(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (name, x), (_, y) in zip(trees.named_leaves(a), trees.named_leaves(b), strict=True):
    assert (x.dtype, x.shape) == (y.dtype, y.shape), name
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name


def save(kept, step, val_loss, **options):
  kept.save(step, make(step, step=step, **options), ABOUT)
  if val_loss is not None:
    kept.score(step, val_loss)


@pytest.mark.parametrize('carry', [True, False])
def test_round_trip_is_bitwise(carry, tmp_path):
  kept = checkpoints.Checkpoints(tmp_path)
  before = make(carry=carry)
  kept.save(5, before, ABOUT)
  kept.score(5, 1.25)
  kept.close()
  again = checkpoints.Checkpoints(tmp_path)
  assert_bitwise(again.restore(5, abstract(make(1, carry=carry, step=0))), before)
  assert again.about(5).items() >= {'format': checkpoints.FORMAT, **ABOUT}.items()
  assert again.val_loss(5) == 1.25
  assert again.newest_good() == 5
  assert again.best_steps() == [5]


def test_params_can_be_read_alone(tmp_path):
  kept = checkpoints.Checkpoints(tmp_path)
  before = make()
  kept.save(5, before, ABOUT)
  kept.close()
  # Neither moments nor carry are needed, not even their files.
  (state_files,) = (tmp_path / 'checkpoints').glob('5/state')
  for path in sorted(state_files.rglob('*'), reverse=True):
    path.rmdir() if path.is_dir() else path.unlink()
  reader = checkpoints.Checkpoints(tmp_path, read_only=True)
  assert_bitwise(reader.restore_params(5, abstract(make(1).params)), before.params)
  with pytest.raises(errors.NoGoodCheckpoint, match='checkpoints: none of its 1 checkpoints is good'):
    reader.newest_good()


def test_the_latest_and_the_best_are_kept(tmp_path):
  kept = checkpoints.Checkpoints(tmp_path, keep_latest=2)
  found = []
  for step, val_loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, 0.5), (6, 4.0), (7, 4.0), (8, 4.0)):
    save(kept, step, val_loss)
    kept.wait()
    found.append((kept.steps(), kept.best_steps()[0]))
  assert found == [
    ([1], 1), ([1, 2], 2), ([2, 3], 2), ([2, 3, 4], 2), ([4, 5], 5), ([5, 6], 5), ([5, 6, 7], 5), ([5, 7, 8], 5)
  ]  # fmt: skip
  assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir() if path.is_dir()) == ['5', '7', '8']
  again = checkpoints.Checkpoints(tmp_path, keep_latest=2)  # what was best is read back
  assert (again.best_steps()[0], again.val_loss(5), again.val_loss(8)) == (5, 0.5, 4.0)
  save(again, 9, 3.0)
  again.wait()
  assert again.steps() == [5, 8, 9]


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), float('-inf'), None])
def test_a_loss_that_is_not_finite_or_missing_is_never_the_best(bad, tmp_path):
  kept = checkpoints.Checkpoints(tmp_path)
  save(kept, 1, bad)
  kept.wait()
  assert kept.best_steps() == []
  assert kept.val_loss(1) is None
  for step, val_loss in ((2, 1.0), (3, bad), (4, bad)):
    save(kept, step, val_loss)
    kept.wait()
  assert (kept.steps(), kept.best_steps()) == ([2, 4], [2])
  kept.close()
  assert checkpoints.Checkpoints(tmp_path, read_only=True).best_steps() == [2]


def test_of_two_equals_the_one_that_is_kept_is_the_best(tmp_path):
  kept = checkpoints.Checkpoints(tmp_path)
  for step, val_loss in ((1, 2.0), (2, 2.0), (3, 4.0)):
    save(kept, step, val_loss)
    kept.wait()
  assert (kept.steps(), kept.best_steps()) == ([2, 3], [2, 3])


@pytest.mark.parametrize('finish', ['wait', 'close'])
def test_the_last_save_is_on_disk(finish, tmp_path):
  kept = checkpoints.Checkpoints(tmp_path)
  before = make()
  kept.save(5, before, ABOUT)
  getattr(kept, finish)()
  names = [path.name for path in (tmp_path / 'checkpoints').iterdir()]
  assert names == ['5']  # nothing half-written is left
  assert_bitwise(checkpoints.Checkpoints(tmp_path, read_only=True).restore(5, abstract(before)), before)


def test_a_save_does_not_see_what_happens_to_the_state_after_it(tmp_path):
  kept = checkpoints.Checkpoints(tmp_path)
  before = make()
  copy = jax.tree.map(jnp.array, before)
  kept.save(5, before, ABOUT)
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


def flip(path, rng):
  data = bytearray(path.read_bytes())
  data[rng.integers(len(data))] ^= 1 << rng.integers(8)
  path.write_bytes(data)


def test_any_damage_is_noticed_and_named(tmp_path):
  kept = checkpoints.Checkpoints(tmp_path)
  kept.save(5, make(), ABOUT)
  kept.close()
  folder, rng = tmp_path / 'checkpoints' / '5', np.random.default_rng(0)
  sealed = [path for path in folder.rglob('*') if path.is_file() and path.name not in integrity.UNSEALED]
  assert len(sealed) > 10
  for path in sealed:
    good = path.read_bytes()
    for damage in (lambda: flip(path, rng), lambda: path.write_bytes(good[:-1]), lambda: path.write_bytes(b''), path.unlink):  # noqa: B023
      damage()
      found = checkpoints.Checkpoints(tmp_path, read_only=True).problem(5)
      assert found is not None
      assert path.relative_to(folder).as_posix() in found
      path.write_bytes(good)
  assert checkpoints.Checkpoints(tmp_path, read_only=True).problem(5) is None
  # What orbax itself may write after the manifest is without effect.
  for path in folder.rglob('*'):
    if path.name in integrity.UNSEALED:
      path.unlink()
  reader = checkpoints.Checkpoints(tmp_path, read_only=True)
  assert reader.newest_good() == 5
  assert_bitwise(reader.restore(5, abstract(make(1))), make())


def test_a_step_under_another_name_and_of_another_format_are_none(tmp_path, monkeypatch):
  kept = checkpoints.Checkpoints(tmp_path, keep_latest=3)
  for step in (1, 2):
    save(kept, step, None)
  monkeypatch.setattr(checkpoints, 'FORMAT', 77)
  save(kept, 3, None)
  kept.close()
  monkeypatch.undo()
  (tmp_path / 'checkpoints' / '2').rename(tmp_path / 'checkpoints' / '9')
  reader = checkpoints.Checkpoints(tmp_path, read_only=True)
  assert reader.problem(9) == 'its manifest.json is that of 2'
  assert reader.problem(3) == 'it is of format 77, and this version reads 3'
  assert reader.newest_good() == 1


def test_what_is_no_step_is_never_one(tmp_path, capfd):
  kept = checkpoints.Checkpoints(tmp_path)
  save(kept, 5, None)
  kept.close()
  here = tmp_path / 'checkpoints'
  (here / '99').symlink_to('5')
  for name in ('007', '\u0665', '8.orbax-checkpoint-tmp', 'x'):
    (here / name).mkdir()
  (here / '12').write_text('a file')
  (here / '999').mkdir()
  reader = checkpoints.Checkpoints(tmp_path, read_only=True)
  assert reader.steps() == [5, 999]
  assert reader.newest_good() == 5
  assert 'checkpoints/999 is skipped: it has no manifest.json' in capfd.readouterr().err
  again = checkpoints.Checkpoints(tmp_path)
  again.set_aside_after(5)
  assert again.steps() == [5]
  for step in (12, 99, 999):
    save(again, step, None)
  again.close()
  assert again.steps() == [999]


def test_other_arrays_are_told_and_never_cast(tmp_path):
  kept = checkpoints.Checkpoints(tmp_path)
  before = make()
  kept.save(5, before, ABOUT)
  kept.close()
  reader = checkpoints.Checkpoints(tmp_path, read_only=True)
  wrong = {
    'params/more: none -> float32 (2,)': {**before.params, 'more': jnp.ones(2)},
    'params/block_0/kernel: float32 (6,) -> none': {**before.params, 'block_0': {'scale': before.params['block_0']['scale']}},
    'params/embed/embedding: float32 (4, 3) -> float32 (4, 5)': {**before.params, 'embed': {'embedding': jnp.ones((4, 5))}},
    'params/embed/embedding: float32 (4, 3) -> bfloat16 (4, 3)': {**before.params, 'embed': {'embedding': jnp.ones((4, 3), jnp.bfloat16)}},
  }
  for line, params in wrong.items():
    with pytest.raises(errors.NoGoodCheckpoint, match='holds other arrays than this run has') as caught:
      reader.restore(5, abstract(dataclasses.replace(before, params=params)))
    assert line in str(caught.value).splitlines()
  many = {f'layer_{n}': jnp.ones(n) for n in range(30)}
  with pytest.raises(errors.NoGoodCheckpoint) as caught:
    reader.restore(5, abstract(dataclasses.replace(before, params=many)))
  assert len(str(caught.value).splitlines()) == 10
  assert str(caught.value).endswith('and 25 more')


def test_a_step_that_was_half_deleted_does_not_stop_the_next_run(tmp_path):
  kept = checkpoints.Checkpoints(tmp_path, keep_latest=3)
  for step in (1, 2, 3):
    save(kept, step, None if step == 2 else 3.0 + step)
  kept.close()
  doomed = tmp_path / 'checkpoints' / '1.deleted'
  (tmp_path / 'checkpoints' / '1').rename(doomed)
  (doomed / 'manifest.json').unlink()
  again = checkpoints.Checkpoints(tmp_path)
  assert not doomed.exists()
  assert again.newest_good() == 3
  assert again.best_steps() == [3]
  save(again, 4, 9.0)
  again.close()
  assert checkpoints.Checkpoints(tmp_path, read_only=True).steps() == [3, 4]


def test_every_so_many_steps_are_kept_and_later_ones_forgotten(tmp_path):
  kept = checkpoints.Checkpoints(tmp_path, keep_every=4)
  for step in range(1, 11):
    save(kept, step, None)
  kept.wait()
  assert kept.steps() == [4, 8, 10]
  assert kept.problem(8) is None
  (tmp_path / 'checkpoints' / '8' / 'manifest.json').unlink()
  kept.forget_after(4)
  assert kept.steps() == [4]
  save(kept, 8, None)
  kept.wait()
  assert kept.problem(8) is None
  kept.forget_after(0)
  assert kept.steps() == []
  assert kept.newest_good() is None


def test_a_save_that_fails_is_told_by_the_next_step_and_leaves_nothing(tmp_path, monkeypatch):
  kept = checkpoints.Checkpoints(tmp_path)
  save(kept, 1, 2.0)
  monkeypatch.setattr(integrity, 'seal', lambda *args: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
  kept.save(2, make(), ABOUT)
  time.sleep(1)
  with pytest.raises(errors.MachineFailed, match=r'checkpoints/2: the checkpoint could not be saved: .*No space left'):
    kept.check()
  kept.close()
  assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['1']


def test_a_damaged_score_is_named_and_is_none(tmp_path, capfd):
  kept = checkpoints.Checkpoints(tmp_path, keep_latest=2)
  save(kept, 1, 1.0)
  save(kept, 2, 2.0)
  kept.close()
  path = tmp_path / 'checkpoints' / '1' / 'score.json'
  path.write_text(path.read_text().replace('1.0', '9.0'))
  assert kept.best_steps() == [2]
  assert '1/score.json is damaged' in capfd.readouterr().err


def test_what_is_measured_holds_of_files_that_were_not_changed_since(tmp_path):
  folder = tmp_path / '7'
  (folder / 'params').mkdir(parents=True)
  for name in ('a', 'b'):
    (folder / 'params' / name).write_text(name)
  known = integrity.measured(folder, 'params/*')
  assert sorted(known) == ['params/a', 'params/b']
  known['params/a'][1] = 'taken as it was told'
  known['params/b'][2] -= 1  # changed after it was measured
  integrity.seal(folder, '7', known)
  assert integrity.problem(folder, ['params']) == 'params/a is damaged: its SHA-256 is not the sealed one'
  assert integrity.problem(folder, ['params'], share=(1, 2)) is None  # b alone
  assert integrity.problem(folder, ['params'], share=(0, 2)) is not None
