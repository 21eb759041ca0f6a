import itertools

import numpy as np
import pytest

from textgen_jax import errors
from textgen_jax.data import tokens, windows

KINDS = [windows.RandomWindows, windows.ShuffledWindows, windows.ContiguousStreams]


def split(ids, *ranges, is_reply=None):
  """Tokens of one corpus, or of several: (stop of each, weight of each) of ranges that share an end, as `prepare` writes them."""
  ids = np.asarray(ids)
  starts = [0, *(stop - 1 for stop, _ in ranges)]
  parts = [tokens.Range(start, stop, weight) for start, (stop, weight) in zip(starts, ranges, strict=False)]
  return tokens.Split(ids, np.zeros(0, tokens.DOCUMENT), tuple(parts or [tokens.Range(0, len(ids), 1.0)]), is_reply)


MIXTURE = split(np.arange(1000), (100, 0.5), (700, 0.2), (1000, 0.3))


def assert_same(a, b):
  for x, y in zip(a, b, strict=True):
    np.testing.assert_array_equal(x, y)


def chi_square(counts, expected):
  return ((np.asarray(counts) - expected) ** 2 / expected).sum()


@pytest.mark.parametrize('data', [split(np.arange(1000, dtype=np.uint16)), MIXTURE], ids=['one', 'mixture'])
@pytest.mark.parametrize('kind', KINDS)
def test_batch_is_a_function_of_seed_and_step(kind, data):
  one, again, other = kind(data, 3, 4, 7), kind(data, 3, 4, 7), kind(data, 4, 4, 7)
  late = one.batch(50)  # asked for first: no step depends on an earlier one
  for step in (0, 1, 50):
    assert_same(one.batch(step), again.batch(step))
  assert_same(late, again.batch(50))
  assert any((one.batch(step).tokens_BT != other.batch(step).tokens_BT).any() for step in range(3))
  assert (one.batch(0).tokens_BT != one.batch(1).tokens_BT).any()


@pytest.mark.parametrize('end_of_text', [None, 50])
@pytest.mark.parametrize('data', [split(np.arange(1000, dtype=np.uint16)), MIXTURE], ids=['one', 'mixture'])
@pytest.mark.parametrize('kind', KINDS)
def test_targets_are_the_next_tokens_and_rows_a_part_of_the_batch(kind, data, end_of_text):
  reader = kind(data, 0, 5, 7, end_of_text)
  for step in range(40):
    batch = reader.batch(step)
    assert batch.tokens_BT.dtype == batch.targets_BT.dtype == np.int32
    assert batch.weights_BT.dtype == np.float32
    assert batch.tokens_BT.shape == (5, 7)
    np.testing.assert_array_equal(batch.targets_BT, batch.tokens_BT + 1)
    np.testing.assert_array_equal(np.diff(batch.tokens_BT), 1)
    assert (batch.weights_BT == 1).all()
    assert batch.starts_BT is None or batch.starts_BT.dtype == bool
    for rows in (slice(0, 2), slice(2, 5), slice(1, 4, 2)):
      assert_same([x for x in reader.batch(step, rows) if x is not None], [x[rows] for x in batch if x is not None])


@pytest.mark.parametrize('batch_size', [1, 3, 40])
def test_shuffled_windows_are_read_once_an_epoch(batch_size):
  data = windows.ShuffledWindows(split(np.arange(100)), 0, batch_size, 7)
  (count,) = data.windows_per_epoch
  assert count == 13
  rows = np.concatenate([data.batch(step).tokens_BT for step in range(-(-20 * count // batch_size))])
  epochs = rows[: 20 * count].reshape(20, -1)
  firsts = epochs.min(axis=1)
  np.testing.assert_array_equal(np.sort(epochs, axis=1), firsts[:, None] + np.arange(7 * count))
  assert set(firsts) == set(range(7))  # of 20 offsets that are drawn
  assert len(np.unique(epochs - firsts[:, None], axis=0)) == 20


def test_shuffled_windows_of_a_mixture_have_epochs_of_their_own():
  data = windows.ShuffledWindows(MIXTURE, 0, 10, 9)
  assert data.windows_per_epoch == [10, 65, 32]
  first = np.concatenate([data.batch(step).tokens_BT[:5] for step in range(6)])  # 5 rows a step of 10 windows
  for epoch in first.reshape(3, -1):
    np.testing.assert_array_equal(np.sort(epoch), epoch.min() + np.arange(90))
  others = data.batch(0).tokens_BT[5:, 0]
  assert ((others >= 100) & (others < 700)).sum() == 2
  assert (others >= 700).sum() == 3


@pytest.mark.parametrize('length', [1, 2, 5])
def test_the_shortest_text_that_is_shuffled(length):
  data = windows.ShuffledWindows(split(np.arange(2 * length)), 0, 2, length)
  assert {int(first) for step in range(50) for first in data.batch(step).tokens_BT[:, 0]} == set(range(length))
  with pytest.raises(errors.UserError, match=rf'{2 * length - 1} tokens.*sequence_length={length}.*{2 * length}'):
    windows.ShuffledWindows(split(np.arange(2 * length - 1)), 0, 2, length)


def test_random_windows_are_uniform_over_all_places():
  data = windows.RandomWindows(split(np.arange(12)), 0, 1000, 4)
  counts = np.bincount(np.concatenate([data.batch(step).tokens_BT[:, 0] for step in range(20)]), minlength=8)
  assert len(counts) == 8  # 12 - 4 places: the last window reads 7 ... 10 and predicts 11
  assert chi_square(counts, 20_000 / 8) < 24.3  # 7 degrees of freedom, p = 0.001


def test_random_windows_of_a_mixture_follow_the_weights_and_stay_in_their_range():
  # Ranges 0 ... 9, 9 ... 29 and 29 ... 39; windows of 4 tokens and a target begin at 6, 17 and 7 places of them.
  data = windows.RandomWindows(split(np.arange(40), (10, 0.5), (30, 0.2), (40, 0.3)), 0, 1000, 4)
  counts = np.bincount(np.concatenate([data.batch(step).tokens_BT[:, 0] for step in range(20)]), minlength=40)
  places = [range(6), range(9, 26), range(29, 36)]
  assert set(np.flatnonzero(counts)) == set(itertools.chain(*places))
  shares = [counts[list(part)].sum() for part in places]
  assert chi_square(shares, np.array([10_000, 4_000, 6_000])) < 13.8  # 2 degrees of freedom, p = 0.001
  for part, share, limit in zip(places, shares, (20.5, 39.3, 22.5), strict=True):  # 5, 16 and 6 degrees of freedom
    assert chi_square(counts[list(part)], share / len(part)) < limit


@pytest.mark.parametrize('kind', KINDS)
def test_no_window_crosses_a_range(kind):
  generator = np.random.default_rng(0)
  for _ in range(20):
    stops = np.cumsum(generator.integers(40, 90, 3))
    data = kind(split(np.arange(stops[-1]), *zip(stops.tolist(), (0.6, 0.3, 0.1), strict=True)), 1, 5, 6)
    for step in range(30):
      batch = data.batch(step)
      inside = [(batch.tokens_BT[:, 0] >= part.start) & (batch.targets_BT[:, -1] < part.stop) for part in data._split.ranges]
      assert np.any(inside, axis=0).all()


def test_contiguous_streams_continue_within_an_epoch_and_stay_in_their_part():
  data = windows.ContiguousStreams(split(np.arange(3 * 50 + 2, dtype=np.uint8)), 1, 3, 8)
  assert data.steps_per_epoch == [5]  # (50 - 8) // 8
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


def test_streams_of_a_mixture_each_go_on_in_their_own_epochs():
  # 5 rows: 3 of 0 ... 59, 2 of 59 ... 169; parts of 20 and 55 tokens, epochs of 4 and 12 steps.
  data = windows.ContiguousStreams(split(np.arange(170), (60, 0.6), (170, 0.4)), 2, 5, 4)
  assert data.steps_per_epoch == [4, 12]
  parts = [(0, 20), (20, 40), (40, 60), (59, 114), (114, 169)]
  offsets = [set() for _ in parts]
  for epoch in range(40):
    for row, (start, stop) in enumerate(parts):
      steps = 4 if row < 3 else 12
      batches = [data.batch(epoch * steps + step) for step in range(steps)]
      read = np.concatenate([batch.tokens_BT[row] for batch in batches])
      np.testing.assert_array_equal(np.diff(read), 1)
      assert start <= read[0]
      assert batches[-1].targets_BT[row, -1] < stop
      assert [batch.starts_BT[row].tolist() for batch in batches] == [[True] + [False] * 3] + [[False] * 4] * (steps - 1)
      offsets[row].add(int(read[0]) - start)
  assert offsets == [set(range(4))] * 5


def test_rows_are_shared_out_by_hand():
  for rows, weights, expected in [
    (4, [1.0], [4]),
    (4, [0.75, 0.25], [3, 1]),
    (10, [0.6, 0.3, 0.1], [6, 3, 1]),
    (5, [0.55, 0.45], [3, 2]),
    (7, [0.5, 0.3, 0.2], [4, 2, 1]),  # 3.5, 2.1, 1.4: the first has the largest remainder
    (8, [0.34, 0.33, 0.33], [3, 3, 2]),  # 2.72, 2.64, 2.64: of two equal ones the first
    (3, [0.98, 0.01, 0.01], [1, 1, 1]),
    (4, [0.01, 0.98, 0.01], [1, 2, 1]),
    (20, [0.97, 0.02, 0.01], [18, 1, 1]),
  ]:
    assert windows.share_out(rows, weights) == expected
  with pytest.raises(errors.UserError, match=r'training\.batch_size=2 is less than the 3 corpora of data\.mixture'):
    windows.share_out(2, [0.5, 0.3, 0.2])


def test_rows_are_shared_out_whole_and_near_the_weights():
  generator = np.random.default_rng(0)
  for _ in range(500):
    weights = generator.dirichlet(np.full(generator.integers(1, 6), 0.7))
    rows = int(generator.integers(len(weights), 40))
    shares = windows.share_out(rows, weights.tolist())
    assert sum(shares) == rows
    assert min(shares) >= 1
    assert all(share < rows * weight + 1 or share == 1 for share, weight in zip(shares, weights, strict=True))
    if min(rows * weights) >= 1:
      lower = np.floor(rows * weights).astype(int)
      up = np.argsort(lower - rows * weights, kind='stable')[: rows - lower.sum()]
      assert shares == (lower + np.isin(np.arange(len(weights)), up)).tolist()


@pytest.mark.parametrize('length', [1, 2, 5])
def test_the_shortest_text_that_streams_fit(length):
  ids = np.arange(2 * (2 * length + 1))
  data = windows.ContiguousStreams(split(ids), 0, 2, length)
  for step in range(30):
    assert (data.batch(step).targets_BT == data.batch(step).tokens_BT + 1).all()
  with pytest.raises(errors.UserError, match=rf'{len(ids) - 1} tokens.*batch_size=2.*sequence_length={length}.*{len(ids)}'):
    windows.ContiguousStreams(split(ids[1:]), 0, 2, length)


def test_the_shortest_text_that_a_window_fits():
  assert windows.RandomWindows(split(np.arange(5)), 0, 3, 4).batch(9).tokens_BT.tolist() == [[0, 1, 2, 3]] * 3
  with pytest.raises(errors.UserError, match=r'4 tokens: training.sequence_length=4 \(training.batch_size=3\) needs at least 5'):
    windows.RandomWindows(split(np.arange(4)), 0, 3, 4)


def test_every_corpus_of_a_mixture_must_fit():
  with pytest.raises(errors.UserError, match=r'has 4 tokens: training.sequence_length=4 .* needs at least 5'):
    windows.RandomWindows(split(np.arange(50), (47, 0.9), (50, 0.1)), 0, 3, 4)
  windows.RandomWindows(split(np.arange(51), (47, 0.9), (51, 0.1)), 0, 3, 4)
  with pytest.raises(errors.UserError, match=r'has 17 tokens: 2 contiguous streams .*batch_size=4.* need at least 18'):
    windows.ContiguousStreams(split(np.arange(60), (44, 0.5), (60, 0.5)), 0, 4, 4)
  windows.ContiguousStreams(split(np.arange(61), (44, 0.5), (61, 0.5)), 0, 4, 4)


def test_sizes_below_one_are_refused():
  for sizes in ((0, 4), (4, 0), (-1, 4)):
    for kind in KINDS:
      with pytest.raises(errors.UserError, match='at least 1'):
        kind(split(np.arange(50)), 0, *sizes)


# 9 ends a text; ids are otherwise 0 ... 8.
def text_with_ends(size):
  ids = np.random.default_rng(size).integers(0, 10, size).astype(np.uint16)
  ids[0] = ids[-1] = 9
  return ids


def test_starts_are_where_end_of_text_is_read():
  ids = text_with_ends(400)
  random_windows = windows.RandomWindows(split(ids), 0, 6, 9, 9)
  streams, carried = (windows.ContiguousStreams(split(ids), 0, 6, 9, end) for end in (9, None))
  for step in range(30):
    batch = random_windows.batch(step)
    np.testing.assert_array_equal(batch.starts_BT, batch.tokens_BT == 9)
    batch = streams.batch(step)
    begins_BT = carried.batch(step).starts_BT
    np.testing.assert_array_equal(batch.starts_BT, (batch.tokens_BT == 9) | begins_BT)
    assert begins_BT.sum() == (6 if step % streams.steps_per_epoch[0] == 0 else 0)
  assert windows.RandomWindows(split(ids), 0, 6, 9).batch(0).starts_BT is None
  for stride in (2, 5):
    rows = windows.EvaluationRows(split(ids[:33]), 5, stride, 0)  # 0 stands in the padding too, where nothing starts
    batch, places_BT = rows.batch(0, rows.num_rows + 2)
    inside_BT = (places_BT - 1 < 33) & (np.arange(rows.num_rows + 2) < rows.num_rows)[:, None]
    np.testing.assert_array_equal(batch.starts_BT, (batch.tokens_BT == 0) & inside_BT)
    assert not batch.starts_BT[rows.num_rows :].any()
    assert windows.EvaluationRows(split(ids[:33]), 5, stride).batch(0, 2)[0].starts_BT is None


def test_weights_are_of_replies_alone():
  ids, is_reply = np.arange(300), np.random.default_rng(0).random(300) < 0.4
  for reader in (kind(split(ids, is_reply=is_reply), 0, 4, 9) for kind in KINDS):
    for step in range(30):
      batch = reader.batch(step)
      np.testing.assert_array_equal(batch.weights_BT, is_reply[batch.targets_BT])
      assert batch.weights_BT.dtype == np.float32
  for stride in (1, 3, 9):
    rows = windows.EvaluationRows(split(ids, is_reply=is_reply), 9, stride)
    batch, _ = rows.batch(0, rows.num_rows + 3)
    counted = np.sort(batch.targets_BT[batch.weights_BT == 1])
    np.testing.assert_array_equal(counted, np.flatnonzero(is_reply[1:]) + 1)


def test_evaluation_rows_by_hand():
  data = split(np.arange(10, 17, dtype=np.uint8))
  rows = windows.EvaluationRows(data, 4, 4)
  assert rows.num_rows == 2
  batch, places_BT = rows.batch(0, 3)
  assert batch.tokens_BT.tolist() == [[10, 11, 12, 13], [14, 15, 16, 0], [0, 0, 0, 0]]
  assert (batch.targets_BT * batch.weights_BT).tolist() == [[11, 12, 13, 14], [15, 16, 0, 0], [0, 0, 0, 0]]
  assert batch.weights_BT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]
  assert places_BT[:2].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
  assert not rows.batch(5, 7)[0].weights_BT.any()
  rows = windows.EvaluationRows(data, 4, 1)
  assert rows.num_rows == 3
  batch, places_BT = rows.batch(0, 4)
  assert batch.tokens_BT.tolist() == [[10, 11, 12, 13], [11, 12, 13, 14], [12, 13, 14, 15], [0, 0, 0, 0]]
  assert batch.weights_BT.tolist() == [[1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
  assert places_BT[:3, -1].tolist() == [4, 5, 6]


@pytest.mark.parametrize('batch_size', [1, 2, 5])
def test_every_token_but_the_first_is_predicted_once_with_its_context(batch_size):
  for count, length in itertools.product([2, 3, 4, 5, 6, 8, 9, 10, 17, 33], [1, 2, 4, 5, 8, 40]):
    ids = np.arange(100, 100 + count)
    for stride in range(1, length + 1):
      rows = windows.EvaluationRows(split(ids), length, stride)
      seen = []
      for first in range(0, rows.num_rows, batch_size):
        batch, places_BT = rows.batch(first, first + batch_size)
        counts_BT = batch.weights_BT == 1
        assert (counts_BT | (batch.weights_BT == 0)).all()
        assert batch.tokens_BT.shape == batch.targets_BT.shape == places_BT.shape == (batch_size, length)
        np.testing.assert_array_equal(ids[places_BT[counts_BT]], batch.targets_BT[counts_BT])
        seen += places_BT[counts_BT].tolist()
        for row, column in zip(*np.nonzero(counts_BT), strict=True):
          place, context = places_BT[row, column], batch.tokens_BT[row, : column + 1]
          assert len(context) >= min(place, length - stride + 1)
          np.testing.assert_array_equal(context, ids[place - len(context) : place])
      assert sorted(seen) == seen == list(range(1, count)), (count, length, stride)
      last, _ = rows.batch(rows.num_rows - 1, rows.num_rows)
      assert last.weights_BT.any()  # no row in vain


def test_evaluation_needs_something_to_predict_and_a_stride_that_leaves_nothing_out():
  with pytest.raises(errors.UserError, match='1 tokens'):
    windows.EvaluationRows(split(np.arange(1)), 4, 4)
  for stride in (0, 5, -1):
    with pytest.raises(errors.UserError, match=rf'stride={stride} is not in \[1, 4\]'):
      windows.EvaluationRows(split(np.arange(9)), 4, stride)


def test_rows_begin_anew_by_chance_which_the_step_decides():
  data = split(np.arange(40_000, dtype=np.uint16))
  never, often = windows.ContiguousStreams(data, 3, 8, 4), windows.ContiguousStreams(data, 3, 8, 4, None, 0.25)
  begins = np.array([often.batch(step).starts_BT[:, 0] for step in range(1, 500)])
  assert not np.any([never.batch(step).starts_BT for step in range(1, 500)])
  assert abs(begins.mean() - 0.25) < 4 * (0.25 * 0.75 / begins.size) ** 0.5
  assert np.abs(np.corrcoef(begins.T) - np.eye(8)).max() < 0.2  # rows apart
  assert not often.batch(7).starts_BT[:, 1:].any()
  assert_same([x for x in often.batch(7, slice(2, 5)) if x is not None], [x[2:5] for x in often.batch(7) if x is not None])
  np.testing.assert_array_equal(often.batch(7).tokens_BT, never.batch(7).tokens_BT)
