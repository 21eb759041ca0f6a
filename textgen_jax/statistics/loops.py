"""Loops: texts that end by saying one thing over and over."""

from collections.abc import Sequence
from typing import NamedTuple

REPEATS = 3
AT_LEAST = 24  # items; characters, for a text: 'Never, never, never!' is speech


class Loop(NamedTuple):
  """The end of a text, of which each item equals the one `period` before it."""

  period: int
  length: int  # the last round may be unfinished, as the first may


def tail(sequence: Sequence, repeats: int = REPEATS, at_least: int = AT_LEAST) -> Loop | None:
  """The loop that a sequence ends in, by its shortest period; None where it doesn't end in one.

  A loop is `repeats` or more times one period, and `at_least` items long. Takes linear time: the longest end of period p
  has p + z[p] items, z being the z-function of the reversed sequence.
  Source: after the repetitions that Holtzman et al. 2019, arXiv:1904.09751, count, whose released metrics/repetition.py takes
  3 or more tokens that stand twice at the end; characters that stand twice are common, so here it's three times.
  """
  z = z_function(sequence[::-1])
  for period, beyond in enumerate(z[1:], start=1):
    if beyond >= (repeats - 1) * period and period + beyond >= at_least:
      return Loop(period, period + beyond)
  return None


def z_function(sequence: Sequence) -> list[int]:
  """At i, how many items from i on equal those from the start on; all of them at 0. Linear time.

  Source: Gusfield 1997, Algorithms on Strings, Trees, and Sequences, section 1.4.
  """
  size = len(sequence)
  z = [size] * min(size, 1) + [0] * (size - 1)
  left = right = 0  # the stretch of known equality that reaches furthest: [left, right) equals [0, right - left)
  for i in range(1, size):
    equal = min(z[i - left], right - i) if i < right else 0
    while i + equal < size and sequence[equal] == sequence[i + equal]:
      equal += 1
    z[i] = equal
    if i + equal > right:
      left, right = i, i + equal
  return z
