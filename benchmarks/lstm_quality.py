"""Val loss on `shakespeare` at equal seconds of training: our LSTM, the same sizes in PyTorch, and char-rnn's default.

  pip install -e '.[bench]'
  python benchmarks/lstm_quality.py [--minutes=2.5] [--config=configs/shakespeare_lstm.py]

Ours is `python train.py` with that configuration and as many steps as a first, short run says the time allows; PyTorch's are trained for
as many seconds as ours took. PyTorch's LSTM of our sizes has our batches (32 streams of 64 tokens, state carried), AdamW, warmup and
cosine, the cosine over the time; char-rnn's default is two layers of 128, 50 streams of 50 tokens, RMSProp at 2e-3 with a decay of 0.95 a
step of the average, gradients clipped to 5 each, and a rate that is halved twice over the second half of the time (char-rnn multiplies it
by 0.97 an epoch after ten). Compilation counts for ours. All are scored on the whole val split, state carried over all of it; no test
split is read.
"""

import argparse
import math
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import numpy as np

from textgen_jax import command_line
from textgen_jax.data import prepare

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Peer(NamedTuple):
  name: str
  dim: int
  num_layers: int
  rows: int
  length: int


PEERS = (Peer('PyTorch, our sizes', 256, 1, 32, 64), Peer("PyTorch, char-rnn's default", 128, 2, 50, 50))
PEAK_LR = 6e-3  # of AdamW: of the rates that ours was tried with, the one at which these sizes did best


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--minutes', type=float, default=2.5)
  parser.add_argument('--config', default='configs/shakespeare_lstm.py')
  args = parser.parse_args()
  experiment, _ = command_line.parse_experiment(['train.py', f'--config={args.config}', '--workdir=unused'])
  prepared = prepare.prepare(experiment.data, experiment.tokenizer)
  splits = {name: np.asarray(prepared.splits[name].tokens, np.int64) for name in ('train', 'val')}
  print('| | steps | tokens trained on | seconds | val loss (nats) |\n|---|---|---|---|---|')
  steps, budget_s, loss = ours(args.config, args.minutes * 60)
  c = experiment.training
  tell(f'textgen_jax, `{args.config}`', steps, steps * c.batch_size * c.sequence_length, budget_s, loss)
  for peer in PEERS:
    steps, seconds, loss = theirs(peer, splits, prepared.tokenizer.vocab_size, budget_s)
    tell(peer.name, steps, steps * peer.rows * peer.length, seconds, loss)


def tell(name: str, steps: int, tokens: int, seconds: float, loss: float) -> None:
  print(f'| {name} | {steps:,} | {tokens / 1e6:.2f} M | {seconds:.0f} | {loss:.4f} |', flush=True)


def ours(config: str, budget_s: float) -> tuple[int, float, float]:
  """Steps, seconds of the whole command but for the last evaluation, and the loss."""
  per_step, fixed = train(config, 200)
  steps = int((budget_s - fixed) / per_step)
  with tempfile.TemporaryDirectory() as workdir:
    began = time.perf_counter()
    process = command(config, steps, workdir)
    losses, seconds = [], math.nan
    for line in process.stderr:
      if f'step {steps}/{steps}' in line:
        seconds = time.perf_counter() - began
      losses += re.findall(r'val loss ([\d.]+) nats.*whole split', line)
    if process.wait() or not losses:
      raise SystemExit(f'train.py ended with {process.returncode}')
  return steps, seconds, float(losses[-1])


def train(config: str, steps: int) -> tuple[float, float]:
  """Seconds a step, and those before the first, from a short run."""
  with tempfile.TemporaryDirectory() as workdir:
    began, seen = time.perf_counter(), {}
    process = command(config, steps, workdir)
    for line in process.stderr:
      for done in re.findall(rf'step (\d+)/{steps}', line):
        seen.setdefault(int(done), time.perf_counter() - began)
    process.wait()
  first, last = min(seen), max(seen)
  per_step = (seen[last] - seen[first]) / (last - first)
  return per_step, seen[first] - first * per_step


def command(config: str, steps: int, workdir: str) -> Any:
  fields = {'training.num_steps': steps, 'training.log_every_steps': 10, 'training.sample_tokens': 0}
  fields |= {f'training.{name}_every_steps': 0 for name in ('eval', 'checkpoint')}
  flags = [f'--config.{name}={value}' for name, value in fields.items()]
  argv = [sys.executable, 'train.py', f'--config={config}', f'--workdir={workdir}/run', *flags]
  return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def theirs(peer: Peer, splits: dict[str, np.ndarray], vocab_size: int, budget_s: float) -> tuple[int, float, float]:
  import torch
  from torch import nn

  torch.manual_seed(0)
  char_rnn = peer.num_layers > 1
  embed, lstm = nn.Embedding(vocab_size, peer.dim), nn.LSTM(peer.dim, peer.dim, peer.num_layers)
  unembed = nn.Linear(peer.dim, vocab_size)
  params = [*embed.parameters(), *lstm.parameters(), *unembed.parameters()]
  if char_rnn:
    optimizer: Any = torch.optim.RMSprop(params, lr=2e-3, alpha=0.95)
  else:
    optimizer = torch.optim.AdamW(params, lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=0.0)
  size = (len(splits['train']) - 1) // peer.rows
  x_TB, y_TB = (
    torch.from_numpy(splits['train'][shift : shift + size * peer.rows].reshape(peer.rows, size).T.copy()) for shift in (0, 1)
  )
  began, steps, at, carry = time.perf_counter(), 0, 0, None
  while (elapsed := time.perf_counter() - began) < budget_s:
    done = elapsed / budget_s
    cosine = PEAK_LR * min(1, (steps + 1) / 50) * (0.025 + 0.975 * 0.5 * (1 + math.cos(math.pi * done)))
    optimizer.param_groups[0]['lr'] = 2e-3 * 0.5 ** max(0, 4 * (done - 0.5)) if char_rnn else cosine
    if at + peer.length > size:
      at, carry = 0, None
    hidden, carry = lstm(embed(x_TB[at : at + peer.length]), carry)
    carry = tuple(state.detach() for state in carry)
    loss = nn.functional.cross_entropy(unembed(hidden).flatten(0, 1), y_TB[at : at + peer.length].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if char_rnn:
      nn.utils.clip_grad_value_(params, 5.0)
    else:
      nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    steps, at = steps + 1, at + peer.length
  seconds = time.perf_counter() - began
  ids, total, carry = torch.from_numpy(splits['val'].copy()), 0.0, None
  with torch.no_grad():
    for start in range(0, len(ids) - 1, 4096):
      part = ids[start : start + 4097]
      hidden, carry = lstm(embed(part[:-1, None]), carry)
      total += float(nn.functional.cross_entropy(unembed(hidden)[:, 0], part[1:], reduction='sum'))
  return steps, seconds, total / (len(ids) - 1)


if __name__ == '__main__':
  main()
