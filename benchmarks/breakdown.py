"""Where the time of a training step goes on this CPU: each operation's share, by kind; and the step's memory.

  python benchmarks/breakdown.py [--setting=nanogpt_cpu] [--steps=10]

Settings are those of `training_speed.py`. JAX's profiler times every operation of the compiled program, by thread; which kind an operation
is follows from the module that it comes from. `waiting` is what is left of the threads' time: the dispatch of operations, the host's work
between steps, devices that wait for each other's part of a sum. Profiling itself slows a step of many small operations, by about a
third. On one device operations overlap, or stand within one another, and shares can add up to more than all.
"""

import argparse
import collections
import pathlib
import re
import tempfile
import time

import jax
import training_speed

from textgen_jax import allocator, memory

# The first that is found in an operation's place in the program, or in its name, is its kind.
KINDS = (
  ('sums over devices', r'all-reduce|all-gather|reduce-scatter|all-to-all'),
  ('attention but for its projections', r'attention/attention\.mix'),
  ('products with weights', r'/dot_general'),
  ('recurrence', r'while|scan'),
  ('norms, activations, residuals, tables', r'Transformer|LSTM'),
  ('loss, clip, optimizer, guard', r''),
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  settings = [name for name in training_speed.SETTINGS if name != 'lstm_layer']
  parser.add_argument('--setting', default=settings[0], choices=settings)  # one: a process's devices are fixed once it has used them
  parser.add_argument('--steps', type=int, default=10)
  args = parser.parse_args()
  tell(args.setting, args.steps)


def tell(setting: str, steps: int) -> None:
  take, state, made = training_speed.our_training(setting, own_block=True)
  places = dict(re.findall(r'%?([\w.\-]+) = .*?op_name="([^"]*)"', take.as_text()))
  for batch in made[:3]:
    state, _ = take(state, batch)
  jax.block_until_ready(state)
  with tempfile.TemporaryDirectory() as directory:
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = 2
    with jax.profiler.trace(directory, profiler_options=options):
      began = time.perf_counter()
      for i in range(steps):
        state, _ = take(state, made[i % len(made)])
      jax.block_until_ready(state)
      wall_s = time.perf_counter() - began
    (trace,) = pathlib.Path(directory).rglob('*.xplane.pb')
    events = jax.profiler.ProfileData.from_file(str(trace))
    times = by_kind(events, places)
  total_ms = wall_s * 1e3 / steps * jax.device_count()
  times['waiting'] = max(0.0, total_ms * steps - sum(times.values()))
  peak = (memory.peak_bytes(take) or 0) / 2**20
  a_step = f'{wall_s * 1e3 / steps:.0f} ms a step while profiled'
  print(f'\n{setting}, own block: {a_step}, {jax.device_count()} devices, {peak:.0f} MiB on each\n')
  print('| kind of operation | ms a step and device | share |\n|---|---|---|')
  for kind in [*(name for name, _ in KINDS), 'waiting']:
    ms = times[kind] / steps
    print(f'| {kind} | {ms / jax.device_count():.1f} | {ms / total_ms:.0%} |')


def by_kind(events: jax.profiler.ProfileData, places: dict[str, str]) -> collections.Counter[str]:
  """Milliseconds of all threads."""
  times: collections.Counter[str] = collections.Counter()
  for plane in events.planes:
    for line in plane.lines:
      for event in line.events:
        name = dict(event.stats).get('hlo_op')
        if name is not None:
          where = f'{name} {places.get(name, "")}'
          times[next(kind for kind, pattern in KINDS if re.search(pattern, where))] += event.duration_ns / 1e6
  return times


if __name__ == '__main__':
  allocator.keep_memory()
  main()
