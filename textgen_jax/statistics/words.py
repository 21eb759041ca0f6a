"""Statistics of words: variety, repetition, rank against frequency, and what training never showed.

Texts of unequal length don't compare: distinct-n falls and Zipf's tail grows with length, so
cut what is compared to equally many words (`cut`).
"""

import collections
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

_WORD = re.compile(r'\w+|[^\w\s]')

Words = Sequence[str]


def split(text: str) -> list[str]:
  """Runs of letters, digits and underscores; every other character that isn't white space is a word of its own. Case counts."""
  return _WORD.findall(text)


def cut(samples: Iterable[Words], total: int) -> list[Words]:
  """The first `total` words of samples, in order; samples beyond them are left out."""
  kept = []
  for sample in samples:
    if total <= 0:
      break
    kept.append(sample[:total])
    total -= len(sample)
  return kept


def ngrams(words: Words, n: int) -> Iterable[tuple[str, ...]]:
  return zip(*(words[i:] for i in range(n)), strict=False)


def distinct_n(samples: Sequence[Words], n: int) -> float | None:
  """|distinct n-grams of all samples| / |words of all samples|; None without words.

  Falls as text grows, since words run out: compare equal numbers of words.
  Source: Li et al. 2016, arXiv:1510.03055, section 5.2 (who divide by words, not by n-grams).
  """
  total = sum(map(len, samples))
  return len(set(itertools.chain.from_iterable(ngrams(words, n) for words in samples))) / total if total else None


def repetition(samples: Sequence[Words], n: int = 4) -> float | None:
  """Mean over samples of 1 - |distinct n-grams| / |n-grams|; samples of under n words don't count, and None where none does.

  The share of a sample's n-grams that repeat an earlier one of the same sample. 0: none; near 1: it loops.
  Source: seq-rep-n of Welleck et al. 2019, arXiv:1908.04319, equation 10.
  """
  shares = [1 - len(set(ngrams(words, n))) / (len(words) - n + 1) for words in samples if len(words) >= n]
  return sum(shares) / len(shares) if shares else None


class Zipf(NamedTuple):
  slope: float  # about -1 for natural text
  ranks: int    # fitted over ranks 1 to this one


def frequencies(samples: Iterable[Words]) -> list[int]:
  """How often each word occurs, the most frequent first."""
  return sorted(collections.Counter(itertools.chain.from_iterable(samples)).values(), reverse=True)


def zipf(samples: Iterable[Words], most_ranks: int = 1000) -> Zipf | None:
  """Least squares of log frequency on log rank, each rank weighing the same.

  Fitted from rank 1 to the last word that occurs at least twice, at most to `most_ranks`: words that occur once are a
  plateau whose length tells of the text's length alone. None where that leaves under 3 ranks.
  Source: Zipf 1949; the fit is the plain one, which leans to the tail (Clauset et al. 2009, arXiv:0706.1062, section 3.1).
  """
  counts = np.array([count for count in frequencies(samples) if count >= 2][:most_ranks])
  if len(counts) < 3:
    return None
  slope, _ = np.polyfit(np.log(np.arange(1, len(counts) + 1)), np.log(counts), 1)
  return Zipf(float(slope), len(counts))


class NgramIndex:
  """The training text's words, to ask which n-grams of another text it holds. Takes 4 bytes a word, and its vocabulary.

  No n-gram spans two documents.
  """

  def __init__(self, documents: Iterable[Words]):
    self._ids: dict[str, int] = {}
    number = self._ids
    # Every document ends with -1, which is no word's number.
    parts = [np.array([*(number.setdefault(word, len(number)) for word in words), -1], np.int32) for words in documents]
    self._words = np.concatenate([*parts, np.array([-1], np.int32)])

  def novelty(self, samples: Sequence[Words], longest: int = 8) -> list[float | None]:
    """The share of n-grams that don't occur in the training text, for n = 1..longest; None where samples hold no n-gram.

    Every occurrence in the samples counts, not every distinct n-gram.
    Source: McCoy et al. 2023 (RAVEN), arXiv:2111.09509, section 4.
    """
    own = np.array([number for words in samples for number in [*(self._ids.get(word, -2) for word in words), -1]], np.int64)
    # Where n-grams begin that both texts hold, and which of them it is: a (n+1)-gram is a known n-gram and one word more.
    own_starts, own_gram = np.arange(len(own)), np.zeros(len(own), np.int64)
    starts, gram = np.arange(len(self._words)), np.zeros(len(self._words), np.int64)
    shares: list[float | None] = []
    for n in range(1, longest + 1):
      own_starts, own_key = _lengthen(own, own_starts, own_gram, n, len(self._ids))
      starts, key = _lengthen(self._words, starts, gram, n, len(self._ids))
      shared, own_gram = np.unique(own_key, return_inverse=True)
      gram = np.searchsorted(shared, key)
      known = gram < len(shared)
      known[known] = shared[gram[known]] == key[known]
      starts, gram = starts[known], gram[known]
      is_seen = np.zeros(len(shared), bool)
      is_seen[gram] = True
      own_starts, own_gram = own_starts[is_seen[own_gram]], own_gram[is_seen[own_gram]]
      total = sum(max(0, len(words) - n + 1) for words in samples)
      shares.append(1 - len(own_starts) / total if total else None)
    return shares


def _lengthen(words: np.ndarray, starts: np.ndarray, gram: np.ndarray, n: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
  """The starts at which an n-th word follows, and a number for each that tells the n-grams apart."""
  # No start is lost to the array's end: a document's -1 ends it before.
  last = words[starts + n - 1].astype(np.int64)
  follows = last >= 0
  return starts[follows], gram[follows] * vocabulary + last[follows]
