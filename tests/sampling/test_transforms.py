import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from textgen_jax.sampling import decode, history, params, transforms
from textgen_jax.sampling import knobs as knobs_lib
from textgen_jax.sampling import rows as rows_lib

# A chi-square variable exceeds these once in a thousand times.
CHI_SQUARE_LIMIT = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 24: 51.18}

top_k, top_p, min_p, draw = map(jax.jit, (transforms.top_k, transforms.top_p, transforms.min_p, transforms.draw))


@functools.partial(jax.jit, static_argnames='uses')
def _next_token(logits_BV, position_B, knobs, uses):
  adjusted_BV = decode.adjust(logits_BV, history.History(position_B), knobs, uses, None)
  return decode.next_token(adjusted_BV, rows_lib.uniforms(knobs.key_B, position_B, 1)[:, 0], knobs, uses)[0]


def next_token(logits_BV, position_B, rows, keys):
  vocab = knobs_lib.Vocab(logits_BV.shape[1])
  uses = knobs_lib.Uses.of(rows[:2] if rows[0] is rows[-1] else rows, vocab)
  return _next_token(logits_BV, position_B, knobs_lib.Knobs.of(rows, keys, uses, vocab), uses)


def random_logits(seed, rows, size):
  """Rows that are smooth, full of ties, of signed zeros, sharp, or mostly -inf; each has one finite logit at least."""
  rng = np.random.default_rng(seed)
  logits_BV = rng.normal(size=(rows, size)) * rng.choice([0.1, 1, 5], size=(rows, 1)) + rng.choice([-30, 0, 30], size=(rows, 1))
  kind_B = np.arange(rows) % 5
  logits_BV[kind_B == 1] = np.round(rng.normal(size=(rows, size)))[kind_B == 1]
  logits_BV[kind_B == 2] = rng.choice([0.0, -0.0, 1.0, -1.0], size=(rows, size))[kind_B == 2]
  logits_BV[(kind_B == 3)[:, None] & (rng.random((rows, size)) < 0.7)] = -np.inf
  logits_BV[kind_B == 4] *= 20
  logits_BV[np.arange(rows), rng.integers(size, size=rows)] = rng.normal(size=rows)
  return logits_BV.astype(np.float32)


def softmax(logits_V):
  weights_V = np.exp(logits_V.astype(np.float64) - logits_V.max())
  return weights_V / weights_V.sum()


def kept(logits_BV, filtered_BV):
  """Which tokens a transform left; those must be just as they were."""
  filtered_BV = np.asarray(filtered_BV)
  kept_BV = filtered_BV > -np.inf
  assert not np.isnan(filtered_BV).any()
  assert (filtered_BV[kept_BV] == logits_BV[kept_BV]).all()
  return kept_BV


def test_ordered_bits_compare_as_floats_do():
  rng = np.random.default_rng(0)
  x = rng.normal(size=2000) * 10.0 ** rng.integers(-30, 30, 2000)
  x = np.concatenate([x, [0.0, -0.0, np.inf, -np.inf, 1, 1, -1]]).astype(np.float32)
  bits = np.asarray(jax.jit(transforms._ordered_bits)(x))
  assert bits.dtype == np.uint32
  order = np.argsort(x, kind='stable')
  assert ((np.diff(x[order]) > 0) == (np.diff(bits[order].astype(np.int64)) > 0)).all()
  assert (np.diff(bits[order].astype(np.int64)) >= 0).all()


def test_threshold_is_the_largest_that_is_enough():
  rng = np.random.default_rng(1)
  bits_BV = rng.integers(2**32, size=(64, 9), dtype=np.uint32)
  bits_BV[:8] = rng.choice(np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1], np.uint32), size=(8, 9))
  k_B = rng.integers(1, 10, size=64)
  threshold_B1 = transforms._largest_threshold(jnp.asarray(bits_BV), lambda kept_BV: kept_BV.sum(axis=1) >= k_B)
  assert np.asarray(threshold_B1)[:, 0].tolist() == [sorted(row, reverse=True)[k - 1] for row, k in zip(bits_BV, k_B, strict=True)]
  nothing_B1 = transforms._largest_threshold(jnp.asarray(bits_BV), lambda kept_BV: kept_BV.sum(axis=1) > 9)
  assert not np.asarray(nothing_B1).any()


@pytest.mark.parametrize(('size', 'rows'), [(1, 20), (2, 100), (7, 500), (65, 200), (5000, 20)])
def test_top_k_equals_a_sort(size, rows):
  logits_BV = random_logits(size, rows, size)
  k_B = np.random.default_rng(size).integers(0, size + 3, size=rows)
  k_B[:3] = [0, 1, 2**31 - 1]
  kept_BV = kept(logits_BV, top_k(logits_BV, k_B.astype(np.int32)))
  for logits_V, k, kept_V in zip(logits_BV, k_B, kept_BV, strict=True):
    least = np.sort(logits_V)[::-1][min(k or size, size) - 1]
    assert (kept_V == ((logits_V >= least) & (logits_V > -np.inf))).all()


def test_top_k_keeps_both_zeros_and_drops_all_below():
  logits_BV = np.array([[0.0, -0.0, -1.0, -np.inf], [-0.0, 1.0, 0.0, -1e-30]], np.float32)
  assert kept(logits_BV, top_k(logits_BV, np.array([1, 2], np.int32))).tolist() == [[True, True, False, False], [True, True, True, False]]


@pytest.mark.parametrize(('size', 'rows'), [(1, 20), (2, 100), (7, 500), (65, 200), (5000, 20)])
def test_top_p_equals_a_sort(size, rows):
  logits_BV = random_logits(size, rows, size)
  p_B = np.random.default_rng(size).random(rows).astype(np.float32)
  p_B[:7] = [1, 1e-6, 1e-30, 0.5, 0.999, 1e-40, 0]
  kept_BV = kept(logits_BV, top_p(logits_BV, p_B))
  compared = 0
  for logits_V, p, kept_V in zip(logits_BV, p_B, kept_BV, strict=True):
    possible_V = logits_V > -np.inf
    if p == 1:
      assert (kept_V == possible_V).all()
      continue
    probs_V = softmax(logits_V)
    sorted_V = np.sort(probs_V)[::-1]
    mass_V = np.cumsum(sorted_V)
    # No token, however likely, is left out for a less likely one, and rounding apart none is there without need.
    least = logits_V[kept_V].min()
    assert (kept_V == ((logits_V >= least) & possible_V)).all() or (probs_V[kept_V].min() < 1e-37)
    assert probs_V[kept_V].sum() > p - 1e-6
    assert probs_V[logits_V > least].sum() < p + 1e-6
    if np.abs(mass_V - p).min() > 1e-5:  # rounding can't matter
      compared += 1
      assert (kept_V == (probs_V >= sorted_V[np.argmax(mass_V >= p)] * (1 - 1e-6))).all()
  assert compared >= 3


def test_fewest_tokens_that_reach_exactly_p():
  probs_BV = np.tile(np.array([0.125, 0.5, 0.125, 0.25], np.float32), (4, 1))
  kept_BV = jax.jit(transforms._reaches)(probs_BV, probs_BV, np.array([0.5, 0.75, 0.7500001, 0], np.float32))
  assert kept_BV.tolist() == [[False, True, False, False], [False, True, False, True], [True] * 4, [False, True, False, False]]


def test_top_p_by_hand():
  logits_BV = np.log(np.array([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]], np.float32))
  p_B = np.array([0.8, 0.6, 0.3], np.float32)
  # The two of 0.125 tie, and so do all four of 0.25.
  assert kept(logits_BV, top_p(logits_BV, p_B)).tolist() == [[True] * 4, [False, False, True, True], [True] * 4]


@pytest.mark.parametrize(('size', 'rows'), [(1, 20), (7, 500), (5000, 20)])
def test_min_p_equals_brute_force(size, rows):
  logits_BV = random_logits(size, rows, size)
  p_B = np.random.default_rng(size).random(rows).astype(np.float32) ** 3
  p_B[:6] = [0, 1, 0.5, 1e-6, 1e-30, 0]
  kept_BV = kept(logits_BV, min_p(logits_BV, p_B))
  for logits_V, p, kept_V in zip(logits_BV, p_B, kept_BV, strict=True):
    with np.errstate(divide='ignore'):
      margin_V = logits_V.astype(np.float64) - logits_V.max() - np.log(np.float64(p))
    expected_V = (margin_V >= 0) & (logits_V > -np.inf)
    clear_V = (np.abs(margin_V) > 1e-4) | (p == 1)
    assert (kept_V == expected_V)[clear_V].all()
    assert kept_V[logits_V.argmax()]


def test_draw_gives_possible_tokens_only():
  highest = np.float32(1 - 2**-24)  # the largest float below 1
  for size in (1, 2, 7, 1000):
    logits_BV = random_logits(size, 200, size)
    weights_BV = np.exp(logits_BV - logits_BV.max(axis=1, keepdims=True))
    for uniform in (0.0, 2**-30, 0.5, 1 - 2**-23, highest):
      token_B = np.asarray(draw(logits_BV, np.full(200, uniform, np.float32)))
      assert token_B.dtype == np.int32
      assert (weights_BV[np.arange(200), token_B] > 0).all()
  # In a long row XLA's sums differ by rounding with their place, so that the whole may exceed the sum at the last possible token.
  place_V = np.arange(2000)
  logits_BV = np.where((place_V > 0) & (place_V < 1000), random_logits(0, 200, 2000), -np.inf)[::5].astype(np.float32)
  token_B = np.asarray(draw(logits_BV, np.full(40, highest)))
  assert ((token_B > 0) & (token_B < 1000)).all()
  # Impossible tokens at both ends, by -inf and by underflow.
  logits_BV = np.array([[-np.inf, 1, -np.inf, 2, -np.inf], [-200, 1, -200, 2, -200]], np.float32)
  for uniform, token in ((0.0, 1), (0.26, 1), (0.28, 3), (highest, 3)):  # 1 / (1 + e) = 0.269
    assert draw(logits_BV, np.full(2, uniform, np.float32)).tolist() == [token, token]


def test_draw_inverts_the_cumulative_probability():
  logits_BV = random_logits(3, 300, 20)
  uniform_B = np.random.default_rng(0).random(300).astype(np.float32)
  token_B = np.asarray(draw(logits_BV, uniform_B))
  for logits_V, uniform, token in zip(logits_BV, uniform_B, token_B, strict=True):
    mass_V = np.cumsum(softmax(logits_V))
    assert mass_V[token] > uniform - 1e-6
    assert mass_V[token] - softmax(logits_V)[token] < uniform + 1e-6


def hundred_thousand_draws(logits_V, settings):
  """Tokens that 1000 samples of one prompt have at positions 0..99, [B, T]."""
  rows = 1000
  keys = np.asarray(rows_lib.row_keys(*np.array([(settings.seed, 12345, sample) for sample in range(rows)], np.uint32).T))
  logits_BV = np.tile(logits_V, (rows, 1))
  return np.stack([next_token(logits_BV, np.full(rows, position, np.int32), [settings] * rows, keys) for position in range(100)], axis=1)


def assert_chi_square(observed, expected):
  assert (observed[expected == 0] == 0).all()
  possible = expected > 0
  if possible.sum() == 1:
    return
  statistic = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
  assert statistic < CHI_SQUARE_LIMIT[int(possible.sum()) - 1]


LOGITS_V = np.array([0.3, -1.2, 1.1, 0.0, -0.4], np.float32)


@pytest.mark.parametrize('temperature', [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
  probs_V = softmax(LOGITS_V / temperature)
  drawn_BT = hundred_thousand_draws(LOGITS_V, params.SamplingParams(temperature=temperature, seed=7))
  assert_chi_square(np.bincount(drawn_BT.ravel(), minlength=5), 100_000 * probs_V)
  # Neighbours in time and neighbouring samples are independent of each other.
  expected = 50_000 * np.outer(probs_V, probs_V).ravel()
  assert_chi_square(np.bincount((5 * drawn_BT[:, ::2] + drawn_BT[:, 1::2]).ravel(), minlength=25), expected)
  assert_chi_square(np.bincount((5 * drawn_BT[::2] + drawn_BT[1::2]).ravel(), minlength=25), expected)


# Probabilities at temperature 1: 0.213, 0.048, 0.475, 0.158, 0.106; at 2: 0.221, 0.104, 0.329, 0.190, 0.156.
@pytest.mark.parametrize(
  ('settings', 'allowed'),
  [
    ({'top_k': 1}, {2}),
    ({'top_k': 2}, {0, 2}),
    ({'top_p': 0.68}, {0, 2}),
    ({'top_p': 0.75}, {0, 2, 3}),
    ({'top_p': 0.75, 'temperature': 2.0}, {0, 2, 3, 4}),  # the temperature comes first
    ({'top_p': 0.88}, {0, 2, 3, 4}),
    ({'top_p': 0.88, 'top_k': 4}, {0, 2, 3}),  # p is a share of what top_k left: 0.889 of it here
    ({'min_p': 0.3}, {0, 2, 3}),  # 0.3 * 0.475 = 0.142
    ({'min_p': 0.4, 'top_k': 4, 'top_p': 0.88}, {0, 2}),
  ],
)
def test_draws_follow_the_renormalised_rest(settings, allowed):
  settings = params.SamplingParams(seed=3, **settings)
  rest_V = np.where(np.isin(np.arange(5), list(allowed)), softmax(LOGITS_V / settings.temperature), 0)
  drawn_BT = hundred_thousand_draws(LOGITS_V, settings)
  assert set(drawn_BT.ravel().tolist()) == allowed
  assert_chi_square(np.bincount(drawn_BT.ravel(), minlength=5), 100_000 * rest_V / rest_V.sum())


def keys_of(rows):
  return np.asarray(rows_lib.row_keys(*np.array([(seed, 0, 0) for seed in range(rows)], np.uint32).T))


def test_temperature_0_is_argmax_whatever_else_is_set():
  logits_BV = random_logits(5, 100, 30)
  greedy = params.SamplingParams(temperature=0, top_k=5, top_p=0.5, min_p=0.1)
  drawn = params.SamplingParams(top_k=3, top_p=0.9, min_p=0.01)
  for rows in ([greedy] * 100, [greedy, drawn] * 50):
    token_B = np.asarray(next_token(logits_BV, np.zeros(100, np.int32), rows, keys_of(100)))
    greedy_B = np.array([row.temperature == 0 for row in rows])
    assert (token_B == logits_BV.argmax(axis=1))[greedy_B].all()
  assert not any(knobs_lib.Uses.of([greedy], knobs_lib.Vocab(30)))


@pytest.mark.parametrize('temperature', [1e-300, 1e-44, 2e-38, 1e-10, 1e-8])
def test_tiny_temperatures_end_in_argmax(temperature):
  logits_BV = random_logits(6, 100, 30)
  logits_BV[np.arange(100), np.arange(100) % 30] = 90.0  # 90 / 2e-38 is no float32
  rows = [params.SamplingParams(temperature=temperature)] * 100
  token_B = next_token(logits_BV, np.zeros(100, np.int32), rows, keys_of(100))
  assert (logits_BV[np.arange(100), np.asarray(token_B)] == logits_BV.max(axis=1)).all()


def test_a_huge_temperature_ends_in_a_uniform_draw_among_what_is_possible():
  for temperature in (1e30, 2e38, 1e300):
    drawn_BT = hundred_thousand_draws(np.append(LOGITS_V, -np.inf).astype(np.float32), params.SamplingParams(temperature=temperature))
    assert_chi_square(np.bincount(drawn_BT.ravel(), minlength=6), 100_000 * np.array([0.2] * 5 + [0]))


def test_a_setting_that_is_off_changes_nothing_beside_rows_that_use_it():
  logits_BV = random_logits(8, 200, 40)
  plain = params.SamplingParams()
  rows = [plain, params.SamplingParams(top_k=3), params.SamplingParams(top_p=0.5), params.SamplingParams(min_p=0.2)] * 50
  position_B = np.arange(200, dtype=np.int32)
  mixed_B = next_token(logits_BV, position_B, rows, keys_of(200))
  alone_B = next_token(logits_BV, position_B, [plain] * 200, keys_of(200))
  plain_B = np.array([row is plain for row in rows])
  assert (np.asarray(mixed_B) == np.asarray(alone_B))[plain_B].all()
  assert (np.asarray(mixed_B) != np.asarray(alone_B)).any()


def test_keys_differ_by_seed_prompt_and_sample():
  ingredients = np.array([(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (2**32 - 1, 2**32 - 1, 9)], np.uint32)
  keys = np.asarray(rows_lib.row_keys(*ingredients.T))
  assert len({tuple(key) for key in keys.tolist()}) == len(ingredients)
  assert (np.asarray(rows_lib.row_keys(*ingredients[::-1].T)) == keys[::-1]).all()


ROWS, SIZE, CAPACITY = 1000, 23, 20


def random_history(seed):
  """Of rows whose texts repeat themselves, some empty; what stands after a text's end must not count."""
  rng = np.random.default_rng(seed)
  tokens_BL = rng.integers(rng.choice([1, 2, 4, SIZE], size=(ROWS, 1)), size=(ROWS, CAPACITY)).astype(np.int32)
  length_B = rng.integers(CAPACITY + 1, size=ROWS).astype(np.int32)
  prompt_B = rng.integers(length_B + 1)
  prompts = [row[:size].tolist() for row, size in zip(tokens_BL, prompt_B, strict=True)]
  drawn = [row[start:stop] for row, start, stop in zip(tokens_BL, prompt_B, length_B, strict=True)]
  count_BV = np.stack([np.bincount(row, minlength=SIZE) for row in drawn]).astype(np.int32)
  return history.History(length_B - prompt_B.astype(np.int32), tokens_BL, length_B, history.in_prompts(prompts, SIZE), count_BV), drawn


def some_off(knob_B, off):
  knob_B = np.array(knob_B)
  knob_B[np.arange(len(knob_B)) // 5 % 3 == 0] = off  # of every kind of row
  return knob_B


def unchanged(before_BV, after_BV):
  """Which rows have every bit that they had."""
  return (np.asarray(before_BV).view(np.uint32) == np.asarray(after_BV).view(np.uint32)).all(axis=1)


def test_typical_p_equals_a_sort():
  logits_BV = random_logits(11, ROWS, SIZE)
  p_B = some_off(np.random.default_rng(11).random(ROWS), 1).astype(np.float32)
  p_B[5:10] = [1e-6, 1e-30, 0.999, 1e-40, 0]
  out_BV = jax.jit(transforms.typical_p)(logits_BV, p_B)
  assert unchanged(logits_BV, out_BV)[p_B == 1].all()
  compared = 0
  for logits_V, p, kept_V in zip(logits_BV, p_B, kept(logits_BV, out_BV), strict=True):
    assert kept_V.any()
    if p == 1:
      continue
    probs = softmax(logits_V[logits_V > -np.inf]).tolist()
    surprises = [float(logits_V.max() - logit) - np.log(max(probs)) for logit in logits_V[logits_V > -np.inf].tolist()]
    entropy = sum(prob * surprise for prob, surprise in zip(probs, surprises, strict=True))
    distances = [abs(surprise - entropy) for surprise in surprises]
    expected, mass, farthest, clear = set(), 0.0, -np.inf, True
    for i in sorted(range(len(probs)), key=lambda i: distances[i]):
      tie = bool(expected) and distances[i] - farthest < 1e-9
      if mass >= p and not tie:
        clear &= distances[i] - farthest > 1e-3
        break
      # Rounding of the sum and of the distance, which may be that of several hundred nats, decides nothing in a clear row.
      clear &= abs(mass - p) > 1e-5 or not expected
      expected.add(i)
      mass, farthest = mass + probs[i], max(farthest, distances[i])
    clear &= abs(mass - p) > 1e-5
    compared += clear
    assert not clear or set(np.flatnonzero(kept_V[logits_V > -np.inf]).tolist()) == expected
  assert compared > 500


def test_typical_p_by_hand():
  # Entropies 1.2130 and 0.6365 nats. Surprises 0.693, 1.386, 2.079, 2.079 are 0.520, 0.173 and 0.866 away; 0.405 and 1.099 are
  # 0.231 and 0.462 away.
  probs_BV = np.array([[0.5, 0.25, 0.125, 0.125], [1e-45, 2 / 3, 1 / 3, 1e-45], [0.5, 0.25, 0.125, 0.125]])
  logits_BV = np.log(probs_BV).astype(np.float32)
  p_B = np.array([0.2, 0.5, 0.76], np.float32)
  out_BV = jax.jit(transforms.typical_p)(logits_BV, p_B)
  assert kept(logits_BV, out_BV).tolist() == [[False, True, False, False], [False, True, False, False], [True] * 4]


def test_repetition_penalty_equals_brute_force():
  logits_BV, (past, _) = random_logits(12, ROWS, SIZE), random_history(12)
  logits_BV[::4, :9] = 1e-40  # XLA takes it for 0, but not in a row that stays as it is
  penalty_B = some_off(np.random.default_rng(12).uniform(0.3, 3, ROWS), 1).astype(np.float32)
  out_BV = np.asarray(jax.jit(transforms.repetition_penalty)(logits_BV, past, penalty_B))
  expected_BV = logits_BV.copy()
  for row, (tokens_L, length) in enumerate(zip(past.tokens_BL, past.length_B, strict=True)):
    for token in set(tokens_L[:length].tolist()):
      logit = logits_BV[row, token]
      expected_BV[row, token] = logit * penalty_B[row] if logit < 0 else logit / penalty_B[row]
  np.testing.assert_allclose(out_BV, expected_BV, rtol=1e-6, atol=1e-37)
  assert unchanged(logits_BV, out_BV)[(penalty_B == 1) | (past.length_B == 0)].all()
  assert not unchanged(logits_BV, out_BV).all()


def test_repetition_penalty_at_its_ends_is_finite():
  logits_BV = np.tile(np.array([0, -0.0, 1, -1, -np.inf], np.float32), (3, 1))
  past = history.History(np.zeros(3, np.int32), in_prompt_BV=np.ones((3, 5), bool), count_BV=np.zeros((3, 5), np.int32))
  out_BV = np.asarray(jax.jit(transforms.repetition_penalty)(logits_BV, past, np.array([0, np.inf, 1e-45], np.float32)))
  assert np.isfinite(out_BV[:, :4]).all()
  assert (out_BV[:, 4] == -np.inf).all()
  assert (out_BV[:, 2] > 1e30).tolist() == [True, False, True]


@pytest.mark.parametrize('name', ['presence_penalty', 'frequency_penalty'])
def test_penalties_on_drawn_tokens_equal_brute_force(name):
  logits_BV, (past, drawn) = random_logits(13, ROWS, SIZE), random_history(13)
  logits_BV[::4, :9] = 1e-40
  penalty_B = some_off(np.random.default_rng(13).uniform(-2, 2, ROWS), 0).astype(np.float32)
  penalty_B[:5] = -0.0
  out_BV = np.asarray(jax.jit(getattr(transforms, name))(logits_BV, past, penalty_B))
  expected_BV = logits_BV.astype(np.float64)
  for row, tokens in enumerate(drawn):
    for token in set(tokens.tolist()) if name == 'presence_penalty' else tokens.tolist():
      expected_BV[row, token] -= penalty_B[row]
  np.testing.assert_allclose(out_BV, expected_BV, rtol=1e-5, atol=1e-5)
  assert unchanged(logits_BV, out_BV)[(penalty_B == 0) | (past.drawn_B == 0)].all()
  assert unchanged(logits_BV, out_BV).mean() < 0.7


def ends_of_repeated(tokens, n):
  """The last tokens of the n-grams in `tokens` that begin with its last n - 1 tokens."""
  if n == 0 or len(tokens) < n - 1:
    return set()
  last = tokens[len(tokens) - n + 1 :]
  return {tokens[i + n - 1] for i in range(len(tokens) - n + 1) if tokens[i : i + n - 1] == last}


def test_no_repeat_ngram_equals_brute_force():
  logits_BV, (past, _) = random_logits(14, ROWS, SIZE), random_history(14)
  n_B = some_off(np.random.default_rng(14).choice([1, 2, 2, 3, 3, 4, 5, 9, CAPACITY + 1, 2**16 - 1], ROWS), 0).astype(np.int32)
  # Where all that is possible was there, nothing is banned: here in rows with one possible token, of a text that has it.
  alone_B = np.arange(ROWS) % 10 == 7
  logits_BV[alone_B] = -np.inf
  logits_BV[alone_B, past.tokens_BL[alone_B, 0]] = 1.0
  out_BV = np.asarray(jax.jit(transforms.no_repeat_ngram)(logits_BV, past, n_B))
  emptied, changed = 0, 0
  for row in range(ROWS):
    banned = ends_of_repeated(past.tokens_BL[row, : past.length_B[row]].tolist(), int(n_B[row]))
    expected_V = np.where(np.isin(np.arange(SIZE), list(banned)), -np.inf, logits_BV[row]).astype(np.float32)
    if not (expected_V > -np.inf).any():
      expected_V, emptied = logits_BV[row], emptied + 1
    assert (out_BV[row] == expected_V).all()
    changed += (expected_V != logits_BV[row]).any()
  assert unchanged(logits_BV, out_BV)[n_B == 0].all()
  assert emptied > 5
  assert changed > 200


def test_no_repeat_ngram_where_the_text_is_just_n_tokens_long():
  past = history.History(np.full(3, 3), np.array([[3, 3, 3, 1], [3, 4, 3, 1], [3, 3, 3, 1]], np.int32), np.array([3, 3, 3], np.int32))
  out_BV = jax.jit(transforms.no_repeat_ngram)(np.zeros((3, 5), np.float32), past, np.array([3, 3, 4], np.int32))
  assert (np.asarray(out_BV) == -np.inf).tolist() == [[False] * 3 + [True, False], [False] * 5, [False] * 5]


def test_no_ngram_comes_twice_in_a_text_drawn_under_it():
  n_B, steps, size = np.arange(6, dtype=np.int32), 60, 64
  logits_BV = np.tile(-np.arange(size, dtype=np.float32), (6, 1))  # left alone, every text were 0 0 0
  step = jax.jit(lambda past: history.extend(past, transforms.no_repeat_ngram(logits_BV, past, n_B).argmax(axis=1)))
  past = history.History(jnp.zeros(6, jnp.int32), jnp.zeros((6, steps), jnp.int32), jnp.zeros(6, jnp.int32))
  for _ in range(steps):
    past = step(past)
  none, singles, *texts = past.tokens_BL.tolist()
  assert none == [0] * steps
  assert singles == list(range(steps))
  assert texts[0][:10] == [0, 0, 1, 0, 2, 0, 3, 0, 4, 0]
  for n, text in enumerate(texts, start=2):
    grams = [tuple(text[i : i + n]) for i in range(steps - n + 1)]
    assert len(set(grams)) == len(grams)
    assert len({gram[1:] for gram in grams}) < len(grams)


def test_ban_and_min_length_equal_brute_force():
  rng = np.random.default_rng(16)
  logits_BV, (past, _) = random_logits(16, ROWS, SIZE), random_history(16)
  marked_BV = rng.random((ROWS, SIZE)) < rng.choice([0, 0.1, 0.9, 1], size=(ROWS, 1))
  min_B = some_off(rng.integers(1, CAPACITY, size=ROWS), 0).astype(np.int32)
  banned_BV = np.asarray(jax.jit(transforms.ban)(logits_BV, marked_BV))
  ended_BV = np.asarray(jax.jit(transforms.min_length)(logits_BV, past, min_B, marked_BV))
  emptied = 0
  for row in range(ROWS):
    expected = [-np.inf if mark else logit for logit, mark in zip(logits_BV[row].tolist(), marked_BV[row], strict=True)]
    if max(expected) == -np.inf:
      expected, emptied = logits_BV[row].tolist(), emptied + 1
    assert banned_BV[row].tolist() == expected
    assert ended_BV[row].tolist() == (expected if past.drawn_B[row] < min_B[row] else logits_BV[row].tolist())
  assert emptied > 200
  assert unchanged(logits_BV, banned_BV)[~marked_BV.any(axis=1)].all()
  assert unchanged(logits_BV, ended_BV)[(min_B == 0) | (past.drawn_B >= min_B)].all()
  assert not unchanged(logits_BV, ended_BV).all()


def test_logit_bias_equals_brute_force():
  rng = np.random.default_rng(17)
  logits_BV = random_logits(17, ROWS, SIZE)
  bias_BV = np.where(rng.random((ROWS, SIZE)) < 0.3, rng.normal(size=(ROWS, SIZE)) * 10, 0).astype(np.float32)
  bias_BV[some_off(np.ones(ROWS, bool), False) == 0] = 0
  out_BV = np.asarray(jax.jit(transforms.logit_bias)(logits_BV, bias_BV))
  expected = [[logit + bias for logit, bias in zip(*row, strict=True)] for row in zip(logits_BV.tolist(), bias_BV.tolist(), strict=True)]
  np.testing.assert_allclose(out_BV, expected, rtol=1e-6, atol=1e-6)
  assert unchanged(logits_BV, out_BV)[~bias_BV.any(axis=1)].all()


def test_guide_equals_brute_force():
  own_BV, other_BV = random_logits(18, ROWS, SIZE), np.roll(random_logits(19, ROWS, SIZE), 2, axis=0)
  padding_BV = (np.arange(SIZE) >= SIZE - 3) & (np.arange(ROWS) % 2 == 0)[:, None]
  own_BV[padding_BV], other_BV[padding_BV] = -np.inf, -np.inf
  own_BV[:, 0], other_BV[:, 0] = 0, 0
  own_BV[20:30, :9], other_BV[20:30, 9:] = -np.inf, -np.inf  # nothing is possible after both
  scale_B = some_off(np.random.default_rng(18).uniform(-2, 4, ROWS), 1).astype(np.float32)
  scale_B[25], scale_B[5] = 1.5, 0
  out_BV = np.asarray(jax.jit(transforms.guide)(own_BV, other_BV, scale_B))
  for row in range(ROWS):
    with np.errstate(divide='ignore'):
      own_V, other_V = (x[row] - x[row].max() - np.log(np.exp(x[row].astype(np.float64) - x[row].max()).sum()) for x in (own_BV, other_BV))
    expected = [b + float(scale_B[row]) * (a - b) if min(a, b) > -np.inf else -np.inf for a, b in zip(own_V, other_V, strict=True)]
    if scale_B[row] != 1 and max(expected) > -np.inf:
      np.testing.assert_allclose(out_BV[row], expected, rtol=1e-5, atol=2e-3)
  assert unchanged(own_BV, out_BV)[scale_B == 1].all()
  assert unchanged(own_BV, out_BV)[20:30].all()
  assert (scale_B[20:30] != 1).any()


def in_order(logits_BV, negative_BV, past, knobs):
  """All transforms, one after another."""
  logits_BV = transforms.guide(logits_BV, negative_BV, knobs['guidance'])
  logits_BV = transforms.logit_bias(logits_BV, knobs['bias'])
  for penalty in (transforms.repetition_penalty, transforms.presence_penalty, transforms.frequency_penalty):
    logits_BV = penalty(logits_BV, past, knobs[penalty.__name__])
  logits_BV = transforms.ban(logits_BV, knobs['banned'])
  logits_BV = transforms.min_length(logits_BV, past, knobs['min_length'], knobs['ends'])
  logits_BV = transforms.no_repeat_ngram(logits_BV, past, knobs['no_repeat_ngram'])
  logits_BV = transforms.temperature(logits_BV, knobs['temperature'])
  logits_BV = transforms.top_k(logits_BV, knobs['top_k'])
  for narrow in (transforms.top_p, transforms.min_p, transforms.typical_p):
    logits_BV = narrow(logits_BV, knobs[narrow.__name__])
  return logits_BV, transforms.draw(logits_BV, knobs['uniform'])


def extreme_knobs(seed):
  """Far past what anyone should ask for; infinite where float64 settings don't fit into float32."""
  rng = np.random.default_rng(seed)
  edges = [-np.inf, -3e38, -1e30, -1, -1e-45, 0, 1e-45, 1, 1e30, 3e38, np.inf]
  knobs = {name: rng.choice(edges, ROWS) for name in ('presence_penalty', 'frequency_penalty')}
  knobs |= {name: rng.choice([0, 1e-45, 1e-38, 1e-6, 0.5, 0.999, 1], ROWS) for name in ('top_p', 'min_p', 'typical_p')}
  knobs |= {'guidance': rng.choice(edges[1:-1], ROWS), 'bias': rng.choice(edges, (ROWS, SIZE)), 'uniform': rng.random(ROWS)}
  knobs |= {'repetition_penalty': rng.choice(edges[5:], ROWS), 'temperature': rng.choice([0, 1e-30, 1e-3, 1, 1e30], ROWS)}
  knobs = {name: np.asarray(knob, np.float32) for name, knob in knobs.items()}
  knobs |= {name: rng.choice([0, 1, 2, 2**16 - 1], ROWS).astype(np.int32) for name in ('top_k', 'no_repeat_ngram', 'min_length')}
  return knobs | {name: rng.random((ROWS, SIZE)) < rng.choice([0, 0.5, 1], (ROWS, 1)) for name in ('banned', 'ends')}


def test_no_knob_leads_to_nan_or_to_nothing():
  for seed in range(3):
    logits_BV, (past, _), knobs = random_logits(seed, ROWS, SIZE), random_history(seed), extreme_knobs(seed)
    out_BV, token_B = map(np.asarray, jax.jit(in_order)(logits_BV, random_logits(seed + 9, ROWS, SIZE), past, knobs))
    assert not np.isnan(out_BV).any()
    assert (out_BV.max(axis=1) > -np.inf).all()
    assert (out_BV.max(axis=1) < np.inf).all()
    assert (logits_BV[np.arange(ROWS), token_B] > -np.inf).all()
    assert (out_BV[np.arange(ROWS), token_B] > -np.inf).all()


def test_no_transform_sorts():
  arguments = random_logits(0, ROWS, SIZE), random_logits(1, ROWS, SIZE), random_history(0)[0], extreme_knobs(0)
  operations = set(re.findall(r' = (\w+)\[', str(jax.make_jaxpr(in_order)(*arguments))))
  assert {'scan', 'while', 'cumsum'} <= operations  # within the functions too
  assert not operations & {'sort', 'top_k', 'approx_top_k'}
