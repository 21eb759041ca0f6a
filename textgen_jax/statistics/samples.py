"""Statistics of samples that were drawn in one way, each a mean over samples with its standard error."""

import dataclasses
import math
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from textgen_jax.statistics import loops, words

DISTINCT = (1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Sample:
  """A text and what a model makes of it, each a mean over its tokens (nats)."""

  text: str
  entropy: float  # of the model's own distribution
  log_prob: float  # of the tokens, under that distribution
  drawn_entropy: float | None = None  # of the distribution drawn from: minus the log-probability of what was drawn; None: nothing was


class Estimate(NamedTuple):
  mean: float
  stderr: float | None  # the standard error of the mean; None for one sample
  samples: int  # that count


class Statistic(NamedTuple):
  """A column of tables and a line of pictures."""

  heading: str
  form: str  # of its numbers
  unit: str


STATISTICS = {
  'entropy': Statistic('model entropy', '.3f', 'nats/token'),
  'drawn_entropy': Statistic('drawn entropy', '.3f', 'nats/token'),
  'log_prob': Statistic('log-prob', '.3f', 'nats/token'),
  'new_words': Statistic('new words', '.1%', 'share of words'),
  **{f'distinct_{n}': Statistic(f'distinct-{n}', '.3f', 'distinct n-grams / words') for n in DISTINCT},
  'repeated_4_grams': Statistic('repeated 4-grams', '.1%', 'share of 4-grams'),
  'loops': Statistic('loops', '.0%', 'share of samples'),
}


class Yardstick(NamedTuple):
  """What samples are measured by, the same for all rows of a table."""

  compared_words: int  # distinct-n is taken over so many words of each sample, since it falls with length
  known_words: Collection[str]  # those of the training text, in a set


@dataclasses.dataclass(frozen=True)
class Row:
  """Samples of one setting, or of a text that people wrote."""

  name: str
  knob: str | None  # the setting that makes the row what it is; None for people's text
  value: float | None
  samples: list[Sample]
  statistics: dict[str, Estimate | None]  # by the keys of STATISTICS; None where no sample tells


def row(name: str, knob: str | None, value: float | None, samples: list[Sample], yardstick: Yardstick) -> Row:
  each = [measure(sample, yardstick) for sample in samples]
  return Row(name, knob, value, samples, {key: estimate(one[key] for one in each) for key in STATISTICS})


def measure(sample: Sample, yardstick: Yardstick) -> dict[str, float | None]:
  """One sample's statistics; distinct-n is None where it has fewer words than are compared."""
  split = words.split(sample.text)
  kept = split[: yardstick.compared_words] if len(split) >= yardstick.compared_words else []
  return {
    'entropy': sample.entropy,
    'drawn_entropy': sample.drawn_entropy,
    'log_prob': sample.log_prob,
    'new_words': sum(word not in yardstick.known_words for word in split) / len(split) if split else None,
    **{f'distinct_{n}': words.distinct_n([kept], n) for n in DISTINCT},
    'repeated_4_grams': words.repetition([split]),
    'loops': float(loops.tail(sample.text) is not None),
  }


def estimate(values: Iterable[float | None]) -> Estimate | None:
  """Mean and standard error of the values that are there, taken as independent; None without any."""
  known = [value for value in values if value is not None]
  if not known:
    return None
  mean = sum(known) / len(known)
  if len(known) == 1:
    return Estimate(mean, None, 1)
  return Estimate(mean, math.sqrt(sum((value - mean) ** 2 for value in known) / (len(known) - 1) / len(known)), len(known))


def words_to_compare(texts: Sequence[str]) -> int:
  """Half of what texts that people wrote have on average: samples have as many unless they are no prose at all."""
  return max(1, sum(len(words.split(text)) for text in texts) // (2 * len(texts)))
