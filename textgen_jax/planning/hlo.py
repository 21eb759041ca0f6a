"""What devices say to each other in a compiled program, read from its text."""

import collections
import math
import re
from typing import NamedTuple

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
BITS = {'pred': 8, 'bf16': 16}

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_COLLECTIVE = re.compile(rf'^(?:ROOT )?%?[\w.\-]+ = (.*?) ({"|".join(KINDS)})(-start)?\(')
_CALLED = re.compile(r'(?:calls|to_apply|body|condition|branch_computations)=\{?%?([\w.\-]+(?:, ?%?[\w.\-]+)*)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_SHAPE = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\]')
_GROUPS = re.compile(r'replica_groups=(?:\[(\d+),(\d+)\]|\{\{([\d,]*)\})')


class Said(NamedTuple):
  """Of one kind of collective, in one call of the program."""

  count: int
  bytes: float  # that each device receives, in a ring


def collectives(text: str, num_devices: int) -> dict[str, Said]:
  """The collectives by kind; a loop's as often as it goes round, where the compiler knows how often that is.

  Args:
    text: of a compiled program: `compiled.as_text()`.
    num_devices: that take part where a collective names no groups.
  """
  entry, bodies = _computations(text)
  times = _times(entry, bodies)
  counts: collections.Counter[str] = collections.Counter()
  received: collections.Counter[str] = collections.Counter()
  for name, lines in bodies.items():
    for line in lines:
      if (found := _COLLECTIVE.match(line)) and times[name]:
        counts[found[2]] += times[name]
        received[found[2]] += times[name] * _received(found[2], found[1], bool(found[3]), _group_size(line, num_devices))
  return {kind: Said(counts[kind], received[kind]) for kind in KINDS if counts[kind]}


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
  """The name of the program's own computation, and the lines of each."""
  entry, current = '', ''
  bodies: dict[str, list[str]] = {}
  for line in text.splitlines():
    if found := _COMPUTATION.match(line):
      current = found[2]
      bodies[current] = []
      entry = current if found[1] else entry
    elif current:
      bodies[current].append(line.strip())
  return entry, bodies


def _times(entry: str, bodies: dict[str, list[str]]) -> dict[str, int]:
  """How often each computation runs."""
  times = dict.fromkeys(bodies, 0)

  def visit(name: str, often: int) -> None:
    times[name] += often
    for line in bodies[name]:
      trips = int(found[1]) if (found := _TRIPS.search(line)) else 1
      for called in _CALLED.findall(line):
        for one in re.split(r', ?%?', called):
          if one in bodies:
            visit(one, often * trips)

  if entry:
    visit(entry, 1)
  return times


def _group_size(line: str, num_devices: int) -> int:
  found = _GROUPS.search(line)
  if not found:
    return num_devices
  return int(found[2]) if found[2] else found[3].count(',') + 1 if found[3] else num_devices


def _received(kind: str, result: str, starts: bool, group: int) -> float:
  """Bytes into each device, from the type of a collective's result; what starts one gives its arguments too."""
  sizes = [_bits(dtype) / 8 * math.prod(map(int, filter(None, dims.split(',')))) for dtype, dims in _SHAPE.findall(result)]
  if starts and kind in ('all-gather', 'collective-permute'):  # (arguments, results, and counters of four bytes)
    sizes = [max(sizes)] if len(sizes) < 4 or kind == 'collective-permute' else sizes[len(sizes) // 2 :]
  size, others = sum(sizes), (group - 1) / max(group, 1)
  return {'all-reduce': 2 * size * others, 'reduce-scatter': size * (group - 1), 'collective-permute': size}.get(kind, size * others)


def _bits(dtype: str) -> int:
  found = re.search(r'\d+', dtype)
  return BITS.get(dtype) or (int(found[0]) if found else 32)
