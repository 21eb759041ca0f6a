import numpy as np
import pytest

from textgen_jax import errors
from textgen_jax.data import windows


def assert_same(a, b):
  for x, y in zip(a, b, strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize('kind', [windows.RandomWindows, windows.ContiguousStreams])
def test_batch_is_a_function_of_seed_and_step(kind):
  tokens = np.arange(1000, dtype=np.uint16)
  one, again, other = kind(tokens, 3, 4, 7), kind(tokens, 3, 4, 7), kind(tokens, 4, 4, 7)
  late = one.batch(50)  # asked for first: no step depends on an earlier one
  for step in (0, 1, 50):
    assert_same(one.batch(step), again.batch(step))
  assert_same(late, again.batch(50))
  assert any((one.batch(step).tokens_BT != other.batch(step).tokens_BT).any() for step in range(3))
  assert (one.batch(0).tokens_BT != one.batch(1).tokens_BT).any()


@pytest.mark.parametrize('kind', [windows.RandomWindows, windows.ContiguousStreams])
def test_targets_are_the_next_tokens_and_rows_a_part_of_the_batch(kind):
  data = kind(np.arange(1000, dtype=np.uint16), 0, 5, 7)
  for step in range(40):
    batch = data.batch(step)
    assert batch.tokens_BT.dtype == batch.targets_BT.dtype == np.int32
    assert batch.weights_BT.dtype == np.float32
    assert batch.tokens_BT.shape == (5, 7)
    np.testing.assert_array_equal(batch.targets_BT, batch.tokens_BT + 1)
    np.testing.assert_array_equal(np.diff(batch.tokens_BT), 1)
    assert batch.weights_BT.all()
    for rows in (slice(0, 2), slice(2, 5), slice(1, 4, 2)):
      assert_same([x for x in data.batch(step, rows) if x is not None], [x[rows] for x in batch if x is not None])


def test_random_windows_are_uniform_over_all_places():
  data = windows.RandomWindows(np.arange(12), 0, 1000, 4)
  counts = np.bincount(np.concatenate([data.batch(step).tokens_BT[:, 0] for step in range(20)]), minlength=8)
  assert len(counts) == 8  # 12 - 4 places: the last window reads 7 ... 10 and predicts 11
  expected = 20_000 / 8
  chi_square = ((counts - expected) ** 2 / expected).sum()
  assert chi_square < 24.3  # 7 degrees of freedom, p = 0.001


def test_contiguous_streams_continue_within_an_epoch_and_stay_in_their_part():
  data = windows.ContiguousStreams(np.arange(3 * 50 + 2, dtype=np.uint8), 1, 3, 8)
  assert data.steps_per_epoch == 5  # (50 - 8) // 8
  offsets = set()
  for epoch in range(60):
    batches = [data.batch(epoch * 5 + step) for step in range(5)]
    read = np.concatenate([batch.tokens_BT for batch in batches], axis=1)
    np.testing.assert_array_equal(np.diff(read), 1)
    np.testing.assert_array_equal(read[:, 0] - read[0, 0], [0, 50, 100])
    assert (batches[-1].targets_BT[:, -1] < [50, 100, 150]).all()
    offsets.add(int(read[0, 0]))
    starts = np.concatenate([batch.starts_BT for batch in batches], axis=1)
    assert starts[:, 0].all()
    assert starts.sum() == 3
  assert offsets == set(range(8))


@pytest.mark.parametrize('length', [1, 2, 5])
def test_the_shortest_text_that_streams_fit(length):
  tokens = np.arange(2 * (2 * length + 1))
  data = windows.ContiguousStreams(tokens, 0, 2, length)
  for step in range(30):
    assert (data.batch(step).targets_BT == data.batch(step).tokens_BT + 1).all()
  with pytest.raises(errors.UserError, match=rf'{len(tokens) - 1} tokens.*batch_size=2.*sequence_length={length}.*{len(tokens)}'):
    windows.ContiguousStreams(tokens[1:], 0, 2, length)


def test_the_shortest_text_that_a_window_fits():
  assert windows.RandomWindows(np.arange(5), 0, 3, 4).batch(9).tokens_BT.tolist() == [[0, 1, 2, 3]] * 3
  with pytest.raises(errors.UserError, match=r'4 tokens: training.sequence_length=4 \(training.batch_size=3\) needs at least 5'):
    windows.RandomWindows(np.arange(4), 0, 3, 4)


def test_sizes_below_one_are_refused():
  for sizes in ((0, 4), (4, 0), (-1, 4)):
    with pytest.raises(errors.UserError, match='at least 1'):
      windows.RandomWindows(np.arange(50), 0, *sizes)


def test_evaluation_rows_by_hand():
  rows = windows.EvaluationRows(np.arange(10, 17, dtype=np.uint8), 4)
  assert (rows.num_rows, rows.num_targets) == (2, 6)
  batch = rows.batch(0, 3)
  assert batch.tokens_BT.tolist() == [[10, 11, 12, 13], [14, 15, 16, 0], [0, 0, 0, 0]]
  assert (batch.targets_BT * batch.weights_BT).tolist() == [[11, 12, 13, 14], [15, 16, 0, 0], [0, 0, 0, 0]]
  assert batch.weights_BT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]
  assert not rows.batch(5, 7).weights_BT.any()


@pytest.mark.parametrize('count', [2, 3, 4, 5, 8, 9, 10, 33])
@pytest.mark.parametrize('batch_size', [1, 2, 5])
def test_every_token_but_the_first_is_predicted_once(count, batch_size):
  rows = windows.EvaluationRows(np.arange(count), 4)
  seen = []
  for first in range(0, rows.num_rows, batch_size):
    batch = rows.batch(first, first + batch_size)
    counts = batch.weights_BT == 1
    assert (batch.targets_BT[counts] == batch.tokens_BT[counts] + 1).all()
    seen += batch.targets_BT[counts].tolist()
  assert seen == list(range(1, count))


def test_evaluation_needs_something_to_predict():
  with pytest.raises(errors.UserError, match='1 tokens'):
    windows.EvaluationRows(np.arange(1), 4)
