"""Milliseconds of a training step beside PyTorch: the same mathematics in both, and our own block at the same size.

  pip install -e '.[bench]'
  python benchmarks/training_speed.py [--repeats=7] [--setting=nanogpt_cpu ...]

Settings: nanoGPT's for CPUs (0.80 M parameters, 12 rows of 64 tokens), nanoGPT's 10.6 M model on 8 rows of 256, and an LSTM 512 wide on
32 rows of 128. Our own block (rotary positions, RMS norms, of queries and keys too, squared ReLU, untied tables) is set beside nanoGPT's in
PyTorch and beside itself, written in PyTorch; and, on a CPU that multiplies bfloat16, with products of it (`training.product_dtype=auto`),
beside PyTorch's autocast to it. A step is forward, backward, a clip of the gradient by its global norm and AdamW, on batches
that are made beforehand; `LSTM layer` is forward and backward of one layer alone. Each contender has a process of its own that sleeps while
another is timed; PyTorch has as many threads as there are cores, and the system's malloc. Its LSTM is timed with ours too
(`textgen_jax/allocator.py`), from which it gains a fifth; on more than four cores, or beside an accelerator, ours is the system's.
The share of the peak is of the fastest of some square float32 products in numpy, measured in the same run; products that an LSTM with few
tokens needn't do count as done.
"""

import argparse
import functools
import importlib.metadata
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import contenders
import numpy as np
import torch_models

CORES = os.cpu_count() or 2
VOCAB_SIZE = 65
PEAK_LR, FINAL_LR, WARMUP_STEPS, SCHEDULE_STEPS = 1e-3, 1e-4, 100, 2000
B1, B2, WEIGHT_DECAY, CLIP_NORM = 0.9, 0.99, 0.1, 1.0
SECONDS_A_TURN = 3.0

Steps = Callable[[int], float]  # takes so many steps; gives the last one's loss


SETTINGS = {
  'nanogpt_cpu': torch_models.Sizes(VOCAB_SIZE, 12, 64, 128, 4, 4),
  'nanogpt_10m': torch_models.Sizes(VOCAB_SIZE, 8, 256, 384, 6, 6),
  'lstm': torch_models.Sizes(VOCAB_SIZE, 32, 128, 512, 1),
  'lstm_layer': torch_models.Sizes(VOCAB_SIZE, 32, 128, 512, 1),
}
THEIRS, THEIRS_IN_OUR_BLOCK, THEIRS_WITH_OUR_MALLOC = 'PyTorch', 'PyTorch, our own block', 'PyTorch, our malloc'
NAMES = {
  'nanogpt_cpu': (THEIRS, 'textgen_jax, same mathematics', THEIRS_IN_OUR_BLOCK, 'textgen_jax, own block'),
  'nanogpt_10m': (THEIRS, 'textgen_jax, same mathematics', THEIRS_IN_OUR_BLOCK, 'textgen_jax, own block'),
  'lstm': (THEIRS, THEIRS_WITH_OUR_MALLOC, 'textgen_jax'),
  'lstm_layer': (THEIRS, THEIRS_WITH_OUR_MALLOC, 'textgen_jax'),
}
BFLOAT16 = ', bfloat16'  # what ends the name of a contender that multiplies it


def names(setting: str) -> tuple[str, ...]:
  from textgen_jax import backend

  found = NAMES[setting]
  if not backend.cpu_multiplies_bfloat16():
    return found
  rounded = found[-2:] if SETTINGS[setting].num_heads else found  # of a Transformer our own block alone
  return (*found, *(name + BFLOAT16 for name in rounded))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--repeats', type=int, default=7)
  parser.add_argument('--setting', nargs='+', default=list(SETTINGS), choices=list(SETTINGS))
  parser.add_argument('--serve', metavar='SETTING:NAME', help='for the script itself: time what stdin asks for')
  args = parser.parse_args()
  if args.serve:
    setting, _, name = args.serve.partition(':')
    if name.startswith(('textgen_jax', THEIRS_WITH_OUR_MALLOC)):
      from textgen_jax import allocator

      allocator.keep_memory()  # as train.py does
    contenders.serve(make(setting, name))
    return
  versions = ', '.join(f'{name} {importlib.metadata.version(name)}' for name in ('jax', 'jaxlib', 'torch', 'numpy'))
  peak = max(product_gflops(size) for size in (512, 1024, 2048))
  print(f'{CORES} cores; {versions}; largest float32 product: {peak:.0f} GFLOP/s\n')
  for setting in args.setting:
    compare(setting, args.repeats, peak)


def compare(setting: str, repeats: int, peak_gflops: float) -> None:
  rivals = {name: contenders.Apart(__file__, f'{setting}:{name}') for name in names(setting)}
  steps, times = {}, {name: [] for name in rivals}
  for name, rival in rivals.items():
    rival(2)  # compiles, allocates
    seconds, _ = rival(3)
    steps[name] = max(3, round(SECONDS_A_TURN / (seconds / 3)))
  for _ in range(repeats):
    for name, rival in rivals.items():
      seconds, loss = rival(steps[name])
      assert math.isfinite(loss), name
      times[name].append(seconds / steps[name] * 1e3)
  for rival in rivals.values():
    rival.close()
  peers = [name for name in rivals if name.startswith(THEIRS) and not name.endswith(BFLOAT16)]
  columns = [setting, f'ms a step, median of {repeats}', 'least to most', *(f'times {peer}, by turn' for peer in peers), 'share of peak']
  print('| ' + ' | '.join(columns) + ' |')
  print('|---' * len(columns) + '|')
  for name, ms in times.items():
    median = statistics.median(ms)
    share = flops_a_step(setting) / (median * 1e-3) / (peak_gflops * 1e9)
    cells = [name, f'{median:.1f}', f'{min(ms):.1f} to {max(ms):.1f}', *(against(ms, times[peer]) for peer in peers), f'{share:.0%}']
    print('| ' + ' | '.join(cells) + ' |', flush=True)
  print()


def against(ms: list[float], peer: list[float]) -> str:
  """How many times as fast, by turn: the median, and the spread."""
  ratios = [theirs / mine for mine, theirs in zip(ms, peer, strict=True)]
  return f'{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})'


def flops_a_step(setting: str) -> float:
  """Multiplications and additions of the products, backward pass included, each masked half of attention too."""
  s = SETTINGS[setting]
  if s.num_heads:
    weights = s.num_layers * 12 * s.dim**2 + VOCAB_SIZE * s.dim
    a_token = 6 * weights + 12 * s.num_layers * s.dim * s.sequence_length
  else:
    a_token = 6 * (s.num_layers * 8 * s.dim**2 + (VOCAB_SIZE * s.dim if setting == 'lstm' else 0))
  return a_token * s.batch_size * s.sequence_length


def product_gflops(size: int, seconds: float = 1.0) -> float:
  a, b = np.random.default_rng(0).standard_normal((2, size, size)).astype(np.float32)
  best, began = math.inf, time.perf_counter()
  while time.perf_counter() - began < seconds:
    start = time.perf_counter()
    a @ b
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best / 1e9


def make(setting: str, name: str) -> Steps:
  bare, rounded = name.removesuffix(BFLOAT16), name.endswith(BFLOAT16)
  if bare.startswith(THEIRS):
    return their_layer(rounded) if setting == 'lstm_layer' else theirs(setting, bare == THEIRS_IN_OUR_BLOCK, rounded)
  dtype = 'bfloat16' if rounded else 'float32'
  return our_layer(dtype) if setting == 'lstm_layer' else ours(setting, bare.endswith('own block'), dtype)


def batches(setting: str, count: int = 16) -> np.ndarray:
  s = SETTINGS[setting]
  return np.random.default_rng(0).integers(0, VOCAB_SIZE, (count, s.batch_size, s.sequence_length + 1))


def our_mesh(model: Any, rows: int, product_dtype: str) -> tuple[Any, Any]:
  """Sets JAX up as `train.py` does; gives the configuration of its mesh, and the mesh."""
  from textgen_jax import compilation, experiment, sharding

  e = experiment.Experiment(model=model, training=experiment.TrainingConfig(batch_size=rows, product_dtype=product_dtype))
  compilation.split_cores(e)
  return e.sharding, sharding.make_mesh(e.sharding)


def our_training(setting: str, own_block: bool, product_dtype: str = 'float32') -> tuple[Any, Any, list[Any]]:
  """The compiled step, a state and batches."""
  import jax

  from textgen_jax import compilation, sharding
  from textgen_jax.data import windows
  from textgen_jax.models import build, lstm, transformer
  from textgen_jax.training import optimizer, state, step

  compilation.keep_compiled()
  s = SETTINGS[setting]
  if not s.num_heads:
    config: Any = lstm.LSTMConfig(dim=s.dim, num_layers=s.num_layers)
  elif own_block:
    config = transformer.TransformerConfig(dim=s.dim, num_layers=s.num_layers, num_heads=s.num_heads)
  else:
    config = transformer.TransformerConfig(
      dim=s.dim, num_layers=s.num_layers, num_heads=s.num_heads, position='learned', norm='layer', activation='gelu', qk_norm=False,
      tied_embedding=True, init='gpt2',
    )  # fmt: skip
  mesh_config, mesh = our_mesh(config, s.batch_size, product_dtype)
  model = build.build(config, VOCAB_SIZE, s.sequence_length, sharding.make_constrain(mesh_config, mesh))
  how = optimizer.OptimizerConfig(
    peak_lr=PEAK_LR, final_lr=FINAL_LR, warmup_steps=WARMUP_STEPS, schedule_steps=SCHEDULE_STEPS, b1=B1, b2=B2,
    weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM,
  )  # fmt: skip
  tx = optimizer.build(how)
  init, _, shardings = state.create(model, tx, 0, 0, mesh_config, mesh)
  train_step = step.make_train_step(model, tx, optimizer.make_schedule(how), 1, product_dtype=product_dtype)
  take = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))
  place = sharding.batch_sharding(mesh_config, mesh)
  weights_BT = np.ones((s.batch_size, s.sequence_length), np.float32)
  texts = [x.astype(np.int32) for x in batches(setting)]
  made = [jax.device_put(windows.Batch(x[:, :-1], x[:, 1:], weights_BT, None), place) for x in texts]
  train_state = init()
  return take.lower(train_state, made[0]).compile(), train_state, made


def ours(setting: str, own_block: bool, product_dtype: str) -> Steps:
  take, train_state, made = our_training(setting, own_block, product_dtype)

  def steps(count: int) -> float:
    nonlocal train_state
    for i in range(count):
      train_state, sums = take(train_state, made[i % len(made)])
    total, weight = sums['loss']
    return float(total) / float(weight)

  return steps


def our_layer(product_dtype: str) -> Steps:
  import jax
  import jax.numpy as jnp
  from flax import linen as nn

  from textgen_jax import sharding
  from textgen_jax.models import base, lstm

  s = SETTINGS['lstm_layer']
  config = lstm.LSTMConfig(dim=s.dim, num_layers=1)
  mesh_config, mesh = our_mesh(config, s.batch_size, product_dtype)
  rows = sharding.batch_sharding(mesh_config, mesh)
  layer = lstm.LSTMLayer(config, 'float32')
  x_TBD = jax.random.normal(jax.random.PRNGKey(0), (s.sequence_length, s.batch_size, s.dim))
  carry = (jnp.zeros((s.batch_size, s.dim)),) * 2
  variables = nn.unbox(layer.init(jax.random.PRNGKey(1), x_TBD, carry, None, None, True))
  whole, times = sharding.replicated(mesh), sharding.stacked(rows)
  variables, x_TBD, carry = jax.device_put((variables, x_TBD, carry), (whole, times, rows))

  def total(variables: Any, x_TBD: jax.Array, carry: Any) -> jax.Array:
    with base.operands(product_dtype):
      return jnp.square(layer.apply(variables, x_TBD, carry, None, None, True)[0]).sum()

  backward = jax.jit(jax.value_and_grad(total, argnums=(0, 1)), out_shardings=(whole, (whole, times)))

  def steps(count: int) -> float:
    for _ in range(count):
      loss, grads = backward(variables, x_TBD, carry)
    jax.block_until_ready(grads)
    return float(loss)

  return steps


def their_layer(rounded: bool) -> Steps:
  import torch

  torch.set_num_threads(CORES)
  s = SETTINGS['lstm_layer']
  layer = torch.nn.LSTM(s.dim, s.dim)
  x_TBD = torch.randn(s.sequence_length, s.batch_size, s.dim, requires_grad=True)

  def steps(count: int) -> float:
    for _ in range(count):
      layer.zero_grad(set_to_none=True)
      x_TBD.grad = None
      with torch.autocast('cpu', torch.bfloat16, enabled=rounded):
        loss = layer(x_TBD)[0].square().sum()
      loss.backward()
    return loss.item()

  return steps


def their_training(setting: str, our_block: bool = False, rounded: bool = False) -> tuple[Any, Callable[[Any], Any]]:
  """The model, and a step on a batch of T + 1 ids a row that gives the loss."""
  import torch

  torch.manual_seed(0)
  torch.set_num_threads(CORES)
  model = torch_models.build(SETTINGS[setting], our_block)
  optimizer = torch.optim.AdamW(torch_models.decay_groups(model, WEIGHT_DECAY), lr=PEAK_LR, betas=(B1, B2), fused=True)
  schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(_share_of_peak))

  def take(batch: Any) -> Any:
    with torch.autocast('cpu', torch.bfloat16, enabled=rounded):
      loss = torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    schedule.step()
    return loss

  return model, take


def theirs(setting: str, our_block: bool, rounded: bool) -> Steps:
  import torch

  made = [torch.from_numpy(x) for x in batches(setting)]
  _, take = their_training(setting, our_block, rounded)

  def steps(count: int) -> float:
    for i in range(count):
      loss = take(made[i % len(made)])
    return loss.item()

  return steps


def _share_of_peak(update: int) -> float:
  if update < WARMUP_STEPS:
    return update / WARMUP_STEPS
  done = min(1.0, (update - WARMUP_STEPS) / (SCHEDULE_STEPS - WARMUP_STEPS))
  return (FINAL_LR + (PEAK_LR - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * done))) / PEAK_LR


if __name__ == '__main__':
  main()
