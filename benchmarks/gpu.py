"""Training and generation speed on an accelerator, through the project's own training step and `generate`, in ten minutes at most.

  pip install -e '.[cuda13]'
  python benchmarks/gpu.py [--models gpt2_124m nanogpt_10m lstm] [--repeats=5] [--peers] [--output=FILE]

Models compute in bfloat16: GPT-2's smallest (`configs/gpt2_124m.py`, a table of 50,304 rows), nanoGPT's for one GPU
(`configs/tiny_shakespeare_nanogpt_gpu.py`, bytes in place of its 65 characters), and an LSTM of two layers 1,024 wide that carries its
state. A model's ways of taking a step are timed in turns, in one process, on one training state that they hand on. `kernel` is what the
compiled program holds, whatever was asked for. MFU is the model's FLOPs (products, backward pass included, each masked half of attention
too) a second, over those of the fastest of some bfloat16 products of [8192, 8192] in the same run. Memory is what XLA plans for one
program, the state included. Rows a step are halved until every way fits. Generation draws texts of 128 tokens, batches of like prompts,
encoding and decoding included. --peers has PyTorch do the same first, in a process of its own (`gpu_peers.py`; it needs `.[bench]`), whose
memory is the most that PyTorch had in use, and whose compilation is the first step; it has --minutes of its own.

One device is used. --dry_run shrinks all sizes, so that it runs on a CPU in less than a minute: its figures mean nothing.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch_models
from flax import linen as nn
from jax.sharding import AxisType

from textgen_jax import command_line, sharding
from textgen_jax.data import windows
from textgen_jax.models import base, build, layers, lstm
from textgen_jax.sampling import generate, params
from textgen_jax.text import byte
from textgen_jax.training import optimizer, state, step

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEMPERATURE = 0.8
FIELDS = ('model', 'way', 'kernel', 'rows x tokens', 'ms a step', 'least to most', 'tokens/s', 'model TFLOP a step', 'MFU')
FIELDS += ('GiB', 'compiled in', 'times the first way, by turn')


class Way(NamedTuple):
  """One way of taking the step of a model."""

  changes: dict[str, Any]  # of the model's config
  steps_a_dispatch: int = 1


class Workload(NamedTuple):
  config: build.ModelConfig
  optimizer: optimizer.OptimizerConfig
  rows: int
  length: int
  ways: dict[str, Way]  # all of one parameter tree
  carries: bool = False


class Sizes(NamedTuple):
  """What a dry run has less of."""

  turn_s: float  # of training, about
  product: int  # its peak is measured on square matrices of this size
  new_tokens: int
  batches: tuple[int, ...]  # of generation


FULL, DRY = Sizes(1.0, 8192, 128, (1, 16, 256)), Sizes(0.0, 256, 8, (1, 3))
KERNELS = {'__cudnn$fmha': 'cudnn', 'splash_mha': 'splash', 'lstm_advance': 'triton'}  # by what they are in a compiled program
TRANSFORMER_WAYS = {
  'plain': Way({'attention_kernel': 'plain'}),
  'auto': Way({}),
  'blocks': Way({'attention_kernel': 'blocks'}),
  'auto, 8 steps a dispatch': Way({}, 8),
}


class Clock:
  """Ends the benchmark in time: what is left by then is skipped, and told."""

  def __init__(self, minutes: float):
    self._ends = time.monotonic() + 60 * minutes

  def left_s(self) -> float:
    return self._ends - time.monotonic()


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--models', nargs='+', default=list(MODELS), choices=list(MODELS))
  parser.add_argument('--ways', nargs='+', metavar='WAY', help='only these of each model, by the names that the table gives them')
  parser.add_argument('--batches', type=positive, nargs='*', help='of generation')
  parser.add_argument('--repeats', type=positive, default=5)
  parser.add_argument('--minutes', type=minutes, default=9.0, help='no measurement begins after it')
  parser.add_argument('--peers', action='store_true', help='PyTorch and Hugging Face first')
  parser.add_argument('--output', metavar='FILE', help='the tables go there too')
  parser.add_argument('--dry_run', action='store_true', help='tiny sizes')
  args = parser.parse_args(argv)
  sizes = DRY if args.dry_run else FULL
  sizes = sizes if args.batches is None else sizes._replace(batches=tuple(args.batches))
  works = {name: MODELS[name](args.dry_run) for name in args.models}
  if args.ways:
    known = {way for work in works.values() for way in work.ways}
    for way in args.ways:
      if way not in known:
        parser.error(f'--ways {way!r} is none of {", ".join(map(repr, sorted(known)))}')
    works = {name: work._replace(ways={way: how for way, how in work.ways.items() if way in args.ways}) for name, work in works.items()}
  report = Report(args.output)
  peers = ask_peers(args, works, sizes) if args.peers else []  # before JAX takes the memory
  clock = Clock(args.minutes)
  report.say(f'# {datetime.date.today().isoformat()}, {jax.devices()[0].device_kind}\n')
  named = ('jax', 'jaxlib', 'flax', 'optax', *(one for one in ('jax-cuda13-plugin', 'jax-cuda12-plugin', 'libtpu') if installed(one)))
  report.say(', '.join(f'{name} {importlib.metadata.version(name)}' for name in named) + f'; {jax.devices()[0].client.platform_version!r}')
  report.say(f"`python benchmarks/gpu.py {' '.join(sys.argv[1:] if argv is None else argv)}`\n")
  peak_flops = product_flops(sizes.product)
  report.say(f'The fastest bfloat16 product of [{sizes.product}, {sizes.product}]: {peak_flops / 1e12:.4g} TFLOP/s.\n')
  report.say(f"## Training, median of {args.repeats}\n\n| {' | '.join(FIELDS)} |\n{'|---' * len(FIELDS)}|")
  for name, work in works.items():
    if work.ways:
      train(name, work, peak_flops, args.repeats, sizes, clock, report)
    for peer in peers:
      if (peer['part'], peer['model']) == ('training', name):
        report.say(peer_row(peer, work, peak_flops))
  if not sizes.batches:
    return
  titles = [f'batch {batch}' for batch in sizes.batches]
  report.say(f"\n## Generation, tokens/s, median of {args.repeats} (least to most)\n\n| model | {' | '.join(titles)} |")
  report.say('|---' * (1 + len(titles)) + '|')
  for name, work in works.items():
    draw(name, work, args.repeats, sizes, clock, report)
  drawn = [peer['tokens_per_s'] for peer in peers if peer['part'] == 'generation']
  if drawn:
    report.say('| ' + ' | '.join(['Hugging Face, gpt2_124m', *map(spread, drawn)]) + ' |')
  report.say(f'\n{peak_memory()}')


def ask_peers(args: argparse.Namespace, works: dict[str, Workload], sizes: Sizes) -> list[dict[str, Any]]:
  """What PyTorch measured; all that it has told where it took too long or failed."""
  models = {name: peer_sizes(work) for name, work in works.items()}
  asked = {'device': 'cpu' if args.dry_run else 'cuda', 'models': models, 'repeats': args.repeats, 'turn_s': sizes.turn_s}
  asked |= {'batches': sizes.batches, 'new_tokens': sizes.new_tokens, 'temperature': TEMPERATURE}
  script = pathlib.Path(__file__).with_name('gpu_peers.py')
  with tempfile.TemporaryFile('w+') as told:
    try:
      done = subprocess.run([sys.executable, str(script), json.dumps(asked)], stdout=told, timeout=60 * args.minutes)
      if done.returncode:
        print(f'{script.name} ended with {done.returncode}', file=sys.stderr)
    except subprocess.TimeoutExpired:
      print(f'{script.name} had not ended after {args.minutes} minutes', file=sys.stderr)
    told.seek(0)
    return [json.loads(line) for line in told if line.startswith('{')]


def peer_sizes(work: Workload) -> torch_models.Sizes:
  c: Any = work.config
  vocab = layers.padded_size(byte_tokenizer().vocab_size, c.vocab_multiple)
  heads, dropout = getattr(c, 'num_heads', 0), c.dropout
  return torch_models.Sizes(vocab, work.rows, work.length, c.dim, c.num_layers, heads, dropout)


def peer_row(peer: dict[str, Any], work: Workload, peak_flops: float) -> str:
  """A peer's row of the table of training, with the FLOPs of our model's step."""
  ms, tokens, flops = peer['ms'], work.rows * work.length, model_flops(work)
  median = statistics.median(ms)
  cells = [peer['model'], peer['way'], '', f'{work.rows} x {work.length}', f'{median:.4g}', f'{min(ms):.4g} to {max(ms):.4g}']
  cells += [f'{tokens / median * 1e3:,.0f}', f'{flops / 1e12:.4g}', f'{flops / (median * 1e-3) / peak_flops:.1%}']
  return '| ' + ' | '.join([*cells, f'{peer["gib"]:.3g}', f'{peer["first_s"]:.1f} s', '']) + ' |'


def model_flops(work: Workload) -> int:
  """A training step's, by the model's products."""
  model = build.build(work.config, byte_tokenizer().vocab_size, work.length)
  params = jax.eval_shape(lambda: nn.unbox(base.init_params(model, jax.random.PRNGKey(0))))
  return base.flops_per_token(model, params, work.length) * work.rows * work.length


def spread(speeds: list[float]) -> str:
  return f'{statistics.median(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f})'


def positive(text: str) -> int:
  number = int(text)
  if number < 1:
    raise argparse.ArgumentTypeError(f'{text} is below 1')
  return number


def minutes(text: str) -> float:
  number = float(text)
  if not 0 < number <= 24 * 60:
    raise argparse.ArgumentTypeError(f'{text} is not in (0, 1440]')
  return number


class Report:
  """Lines on stdout, and in a file as they come: a run that ends early leaves what it had."""

  def __init__(self, path: str | None):
    self._path = None if path is None else pathlib.Path(path)
    if self._path is not None:
      try:
        self._path.write_text('')
      except OSError as error:
        raise SystemExit(f'--output={path!r}: {error.strerror}') from error

  def say(self, line: str) -> None:
    print(line, flush=True)
    if self._path is not None:
      with self._path.open('a') as file:
        file.write(line + '\n')


def installed(name: str) -> bool:
  try:
    importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return False
  return True


def peak_memory() -> str:
  found = jax.devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' not in found:
    return 'This device tells nothing of its memory.'
  used, limit = (found.get(name, 0) / 2**30 for name in ('peak_bytes_in_use', 'bytes_limit'))
  return f'Most memory in use at any time: {used:.1f} GiB of the {limit:.1f} that JAX may take.'


def product_flops(size: int, repeats: int = 5) -> float:
  """FLOP/s of the fastest of some chains of square products."""
  products = max(1, min(50, 2**34 // size**3 or 20))
  a, b = (jax.random.normal(jax.random.PRNGKey(i), (size, size), jnp.bfloat16) for i in range(2))
  b = b / size**0.5  # products of products keep their size

  @jax.jit
  def chain(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, products, lambda _, x: x @ b, a)

  def seconds() -> float:
    began = time.perf_counter()
    jax.block_until_ready(chain(a, b))
    return time.perf_counter() - began

  seconds()
  return 2 * size**3 * products / min(seconds() for _ in range(repeats))


# What is run.


def gpt2_124m(dry_run: bool) -> Workload:
  experiment = command_line.load_config(str(ROOT / 'configs' / 'gpt2_124m.py'))
  small = {'dim': 64, 'num_layers': 1, 'num_heads': 2, 'vocab_multiple': 1}
  return _transformer(experiment, small, rows=32, dry_run=dry_run, ways=TRANSFORMER_WAYS)


def nanogpt_10m(dry_run: bool) -> Workload:
  experiment = command_line.load_config(str(ROOT / 'configs' / 'tiny_shakespeare_nanogpt_gpu.py'))
  # Kernels drop no attention weights: `auto` is plain with this model's dropout of them, so kernels are timed without it.
  ways = {'dropout 0.2, auto': Way({}), 'dropout 0.2, auto, 8 steps a dispatch': Way({}, 8)}
  ways['dropout 0.2 but of attention weights, auto'] = Way({'attention_dropout': 0.0})
  none = {'dropout': 0.0, 'attention_dropout': 0.0}
  ways |= {f'no dropout, {name}': Way({**TRANSFORMER_WAYS[name].changes, **none}) for name in ('plain', 'auto', 'blocks')}
  return _transformer(experiment, {'dim': 32, 'num_layers': 1, 'num_heads': 2}, rows=64, dry_run=dry_run, ways=ways)


def _transformer(experiment: Any, small: dict[str, int], rows: int, dry_run: bool, ways: dict[str, Way]) -> Workload:
  changes = {'compute_dtype': 'bfloat16', **(small if dry_run else {})}
  length = 64 if dry_run else experiment.training.sequence_length
  how = dataclasses.replace(experiment.optimizer, schedule_steps=experiment.training.num_steps)
  return Workload(dataclasses.replace(experiment.model, **changes), how, 2 if dry_run else rows, length, ways)


def lstm_1024(dry_run: bool) -> Workload:
  config = lstm.LSTMConfig(dim=32 if dry_run else 1024, num_layers=2, compute_dtype='bfloat16')
  ways = {'plain': Way({'recurrence_kernel': 'plain'}), 'auto': Way({}), 'auto, 8 steps a dispatch': Way({}, 8)}
  rows, length = (4, 16) if dry_run else (128, 128)
  return Workload(config, optimizer.OptimizerConfig(schedule_steps=10_000), rows, length, ways, carries=True)


MODELS: dict[str, Callable[[bool], Workload]] = {'lstm': lstm_1024, 'nanogpt_10m': nanogpt_10m, 'gpt2_124m': gpt2_124m}


# Training.


class Program(NamedTuple):
  """A compiled way of taking steps."""

  run: Any  # (state, batches) -> (state, sums)
  batches: Any
  steps_a_dispatch: int
  compile_s: float
  plan: Any  # XLA's account of memory; None where it gives none
  kernel: str


def train(name: str, work: Workload, peak_flops: float, repeats: int, sizes: Sizes, clock: Clock, report: Report) -> None:
  """The model's rows of the table."""
  for rows in (work.rows >> halvings for halvings in range(work.rows.bit_length())):
    if clock.left_s() <= 0:
      report.say(f'| {name} | skipped for want of time |' + ' |' * (len(FIELDS) - 2))
      return
    try:
      rows_of_table(name, work._replace(rows=rows), peak_flops, repeats, sizes, clock, report)
      return
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error) or rows == 1:
        raise
      report.say(f'| {name} | {rows} rows do not fit |' + ' |' * (len(FIELDS) - 2))


def rows_of_table(name: str, work: Workload, peak_flops: float, repeats: int, sizes: Sizes, clock: Clock, report: Report) -> None:
  train_state, flops = None, 0
  programs: dict[str, Program] = {}
  counts: dict[str, int] = {}
  for way in work.ways:
    if programs and clock.left_s() <= 0:
      continue
    model = build.build(dataclasses.replace(work.config, **work.ways[way].changes), byte_tokenizer().vocab_size, work.length)
    fresh, take = own_step(model, work)
    if train_state is None:
      train_state = fresh()
      flops = model_flops(work)
    programs[way] = compiled(take, train_state, work, work.ways[way].steps_a_dispatch)
    _, train_state = timed(programs[way], train_state, 1)
    seconds, train_state = timed(programs[way], train_state, 2)
    counts[way] = max(1, round(sizes.turn_s / (seconds / 2)))
  ms: dict[str, list[float]] = {way: [] for way in programs}
  for _ in range(repeats):
    for way, program in programs.items():
      seconds, train_state = timed(program, train_state, counts[way])
      ms[way].append(seconds / (counts[way] * program.steps_a_dispatch) * 1e3)
  for way, program in programs.items():
    report.say('| ' + ' | '.join([name, way, *figures(ms[way], next(iter(ms.values())), program, work, flops, peak_flops)]) + ' |')


def figures(ms: list[float], first_ms: list[float], program: Program, work: Workload, flops: int, peak_flops: float) -> list[str]:
  median, tokens = statistics.median(ms), work.rows * work.length
  ratios = [other / mine for mine, other in zip(ms, first_ms, strict=True)]
  cells = [program.kernel, f'{work.rows} x {work.length}', f'{median:.4g}', f'{min(ms):.4g} to {max(ms):.4g}']
  cells += [f'{tokens / median * 1e3:,.0f}', f'{flops / 1e12:.4g}', f'{flops / (median * 1e-3) / peak_flops:.1%}']
  cells += ['' if program.plan is None else f'{program.plan.peak_memory_in_bytes / 2**30:.3g}', f'{program.compile_s:.1f} s']
  return [*cells, f'{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})']


@functools.cache
def byte_tokenizer() -> Any:
  return byte.ByteTokenizer()


def own_step(model: Any, work: Workload) -> tuple[Any, Any]:
  """A function that makes a fresh state, and the training step."""
  places = sharding.ShardingConfig(data=1)
  mesh = jax.make_mesh((1, 1, 1), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])
  tx, schedule = optimizer.build(work.optimizer), optimizer.make_schedule(work.optimizer)
  fresh, _, _ = state.create(model, tx, 0, work.rows if work.carries else 0, places, mesh)
  return fresh, step.make_train_step(model, tx, schedule, 1)


def compiled(take: Any, train_state: Any, work: Workload, steps: int) -> Program:
  batches = random_batches(work, steps)

  def several(train_state: Any, batches: Any) -> Any:
    """Steps that one dispatch takes; the last one's metrics."""
    train_state, sums = jax.lax.scan(take, train_state, batches)
    return train_state, jax.tree.map(lambda x: x[-1], sums)

  began = time.perf_counter()
  run = jax.jit(take if steps == 1 else several, donate_argnums=0).lower(train_state, batches).compile()
  seconds, text = time.perf_counter() - began, run.as_text()
  kernel = next((label for mark, label in KERNELS.items() if mark in text), 'none')
  return Program(run, batches, steps, seconds, run.memory_analysis(), kernel)


def random_batches(work: Workload, steps: int) -> Any:
  lead = () if steps == 1 else (steps,)
  ids = np.random.default_rng(0).integers(0, 256, (*lead, work.rows, work.length + 1), dtype=np.int32)
  starts = np.zeros(ids[..., 1:].shape, bool) if work.carries else None
  batch = windows.Batch(ids[..., :-1], ids[..., 1:], np.ones(ids[..., 1:].shape, np.float32), starts)
  return jax.device_put(batch, jax.devices()[0])


def timed(program: Program, train_state: Any, dispatches: int) -> tuple[float, Any]:
  began = time.perf_counter()
  for _ in range(dispatches):
    train_state, sums = program.run(train_state, program.batches)
  total, weight = (float(x) for x in sums['loss'])
  seconds = time.perf_counter() - began
  assert math.isfinite(total / weight)
  return seconds, train_state


# Generation.


def draw(name: str, work: Workload, repeats: int, sizes: Sizes, clock: Clock, report: Report) -> None:
  model = build.build(work.config, byte_tokenizer().vocab_size, work.length)
  weights = jax.jit(lambda: nn.unbox(base.init_params(model, jax.random.PRNGKey(0))))()
  cells = []
  for batch in sizes.batches:
    if clock.left_s() <= 0:
      cells.append('skipped for want of time')
      continue
    speeds = [tokens_per_s(model, weights, batch, sizes.new_tokens, seed) for seed in range(repeats + 1)][1:]  # the first compiles
    cells.append(spread(speeds))
  report.say('| ' + ' | '.join([name, *cells]) + ' |')


def tokens_per_s(model: Any, weights: Any, batch: int, new_tokens: int, seed: int) -> float:
  prompts = [f'{seed % 10}{row:03}text' for row in range(batch)]
  settings = params.SamplingParams(max_new_tokens=new_tokens, temperature=TEMPERATURE, seed=seed, stop_at_end=False)
  began = time.perf_counter()
  texts = generate.generate(model, weights, byte_tokenizer(), prompts, settings)
  seconds = time.perf_counter() - began
  assert [len(one.tokens) for one in texts] == [new_tokens] * batch
  return batch * new_tokens / seconds


if __name__ == '__main__':
  main()
