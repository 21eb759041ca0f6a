import jax
import jax.numpy as jnp
import numpy as np
import pytest

from textgen_jax.sampling import decode, params, transforms

# A chi-square variable exceeds these once in a thousand times.
CHI_SQUARE_LIMIT = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 24: 51.18}

top_k, top_p, min_p, draw = map(jax.jit, (transforms.top_k, transforms.top_p, transforms.min_p, transforms.draw))
next_token = jax.jit(decode.next_token, static_argnames='uses')


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
  keys = np.asarray(decode.row_keys(*np.array([(settings.seed, 12345, sample) for sample in range(rows)], np.uint32).T))
  knobs, uses = decode.Knobs.of([settings] * rows, keys), decode.Uses.of([settings])
  logits_BV = np.tile(logits_V, (rows, 1))
  return np.stack([next_token(logits_BV, np.full(rows, position, np.int32), knobs, uses) for position in range(100)], axis=1)


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
  return np.asarray(decode.row_keys(*np.array([(seed, 0, 0) for seed in range(rows)], np.uint32).T))


def test_temperature_0_is_argmax_whatever_else_is_set():
  logits_BV = random_logits(5, 100, 30)
  greedy = params.SamplingParams(temperature=0, top_k=5, top_p=0.5, min_p=0.1)
  drawn = params.SamplingParams(top_k=3, top_p=0.9, min_p=0.01)
  for rows in ([greedy] * 100, [greedy, drawn] * 50):
    token_B = np.asarray(next_token(logits_BV, np.zeros(100, np.int32), decode.Knobs.of(rows, keys_of(100)), decode.Uses.of(rows)))
    greedy_B = np.array([row.temperature == 0 for row in rows])
    assert (token_B == logits_BV.argmax(axis=1))[greedy_B].all()
  assert decode.Uses.of([greedy]) == decode.Uses(False, False, False, False)


@pytest.mark.parametrize('temperature', [1e-300, 1e-44, 2e-38, 1e-10, 1e-8])
def test_tiny_temperatures_end_in_argmax(temperature):
  logits_BV = random_logits(6, 100, 30)
  logits_BV[np.arange(100), np.arange(100) % 30] = 90.0  # 90 / 2e-38 is no float32
  rows = [params.SamplingParams(temperature=temperature)] * 100
  token_B = next_token(logits_BV, np.zeros(100, np.int32), decode.Knobs.of(rows, keys_of(100)), decode.Uses.of(rows))
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
  mixed_B = next_token(logits_BV, position_B, decode.Knobs.of(rows, keys_of(200)), decode.Uses.of(rows))
  alone_B = next_token(logits_BV, position_B, decode.Knobs.of([plain] * 200, keys_of(200)), decode.Uses.of([plain]))
  plain_B = np.array([row is plain for row in rows])
  assert (np.asarray(mixed_B) == np.asarray(alone_B))[plain_B].all()
  assert (np.asarray(mixed_B) != np.asarray(alone_B)).any()


def test_keys_differ_by_seed_prompt_and_sample():
  ingredients = np.array([(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (2**32 - 1, 2**32 - 1, 9)], np.uint32)
  keys = np.asarray(decode.row_keys(*ingredients.T))
  assert len({tuple(key) for key in keys.tolist()}) == len(ingredients)
  assert (np.asarray(decode.row_keys(*ingredients[::-1].T)) == keys[::-1]).all()
