"""What devices say to each other in a compiled program, read from its text."""

import math
import re
from typing import NamedTuple

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
BITS = {'pred': 8, 'bf16': 16}

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_COLLECTIVE = re.compile(rf'^(?:ROOT )?%?[\w.\-]+ = (.*?) ({"|".join(KINDS)})(-start)?\(')
_CHANNEL = re.compile(r'channel_id=(\d+)')
_CALLED = re.compile(r'(?:calls|to_apply|body|condition)=%?([\w.\-]+)|(?:branch_computations|called_computations)=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r'condition=%?([\w.\-]+)')
_BOUND = re.compile(r's32\[\]\S* constant\((\d+)\)')
_SHAPE = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\]')
_LISTED = re.compile(r'replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\})')  # [groups,size]<=[...] or {{0,1},{2,3}}
_NAMED = re.compile(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}")  # mesh['a'=2,'b'=4] {'b'}
_SCATTERS = 'all-reduce-scatter'  # in the name of a computation: a TPU's sum of which each device keeps its part


class Said(NamedTuple):
  """Of one kind of collective, in one call of the program."""

  times: int
  bytes: float  # that each device receives, in a ring


def collectives(text: str, num_devices: int) -> dict[str, Said]:
  """The collectives by kind; a loop's as often as it goes round, where the compiler knows how often that is.

  Args:
    text: of a compiled program: `compiled.as_text()`.
    num_devices: that take part where a collective names no groups.
  """
  entry, bodies = _computations(text)
  times = _times(entry, bodies)
  found: dict[tuple[str, str], tuple[int, float]] = {}
  for name, lines in bodies.items():
    for i, line in enumerate(lines):
      if (match := _COLLECTIVE.match(line)) and times[name]:
        group = _group_size(line, num_devices)
        received = _received(match[2], match[1], bool(match[3]), group)
        kind, received = ('reduce-scatter', received / 2) if name.startswith(_SCATTERS) else (match[2], received)
        # One that products go on beside is written down in the computation of each of its parts, under one channel.
        channel = _CHANNEL.search(line)
        key = kind, channel[1] if channel else f'{name} {i}'
        found[key] = max(found.get(key, (0, 0.0)), (times[name], times[name] * received))
  totals = {kind: [one for (its_kind, _), one in found.items() if its_kind == kind] for kind in KINDS}
  return {kind: Said(sum(count for count, _ in ones), sum(size for _, size in ones)) for kind, ones in totals.items() if ones}


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
      for one, several in _CALLED.findall(line):
        for called in [one] if one else re.findall(r'[\w.\-]+', several):
          if called in bodies:
            visit(called, often * (_trips(line, bodies) if ' while(' in line else 1))

  if entry:
    visit(entry, 1)
  return times


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
  """How often a loop goes round: as XLA says, or else the number that its condition compares with; 1 where neither tells."""
  if found := _TRIPS.search(line):
    return int(found[1])
  condition = _CONDITION.search(line)
  bounds = [int(bound) for one in bodies.get(condition[1], []) for bound in _BOUND.findall(one)] if condition else []
  return bounds[0] if len(bounds) == 1 else 1


def _group_size(line: str, num_devices: int) -> int:
  if found := _NAMED.search(line):
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
    parts = [int(part) if part else sizes[name] for name, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])]
    return math.prod(parts)
  if found := _LISTED.search(line):
    return int(found[1]) if found[1] else found[2].count(',') + 1
  return num_devices


def _received(kind: str, result: str, starts: bool, group: int) -> float:
  """Bytes into each device, from the type of a collective's result; what starts one gives its arguments too."""
  shapes = _SHAPE.findall(result)
  if starts and kind != 'all-reduce':  # arguments, results, and counters, which are scalars
    arrays = [shape for shape in shapes if shape[1]]
    shapes = arrays[len(arrays) // 2 :]
  sizes = [_bits(dtype) / 8 * math.prod(map(int, filter(None, dims.split(',')))) for dtype, dims in shapes]
  size, others = sum(sizes), (group - 1) / max(group, 1)
  return {'all-reduce': 2 * size * others, 'reduce-scatter': size * (group - 1), 'collective-permute': size}.get(kind, size * others)


def _bits(dtype: str) -> int:
  found = re.search(r'\d+', dtype)
  return BITS.get(dtype) or (int(found[0]) if found else 32)
