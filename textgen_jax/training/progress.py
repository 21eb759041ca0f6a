"""What a person sees of a run: the parameter table, the bar, lines where there is no terminal."""

import contextlib
import math
import re
import sys
import time
from typing import Any

import tqdm

from textgen_jax import processes, trees


def parameter_table(params: Any) -> str:
  """A line a parameter; blocks that are alike share one, marked with their number."""
  rows: dict[tuple[str, tuple[int, ...]], int] = {}
  for name, leaf in trees.named_leaves(params):
    key = (re.sub(r'_\d+(?=/)', '_*', name), leaf.shape)
    rows[key] = rows.get(key, 0) + 1
  lines = []
  width = max(len(name) for name, _ in rows)
  for (name, shape), times in rows.items():
    sizes = f'{times} x {shape}' if times > 1 else ' x '.join(map(str, shape))
    lines.append(f'  {name:<{width}}  {sizes:>22}  {times * math.prod(shape):>13,}')
  lines.append(f'  {"all parameters":<{width}}  {"":>22}  {trees.count(params):>13,}')
  return '\n'.join(lines)


def say(text: str) -> None:
  """A line on stderr that doesn't tear the bar; of several processes one talks."""
  if not processes.is_leader():
    return
  with contextlib.suppress(BrokenPipeError):  # a run outlives the terminal that watched it
    tqdm.tqdm.write(text, file=sys.stderr)


class Progress:
  """A tqdm bar on a terminal, plain lines elsewhere: step, loss, tokens/s, time left."""

  def __init__(self, first_step: int, num_steps: int):
    self._first, self._last = first_step, num_steps
    self._began: float | None = None
    self._bar = tqdm.tqdm(
      total=num_steps,
      initial=first_step,
      desc='train',
      unit='step',
      dynamic_ncols=True,
      disable=not (sys.stderr.isatty() and processes.is_leader()),
      bar_format='{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]',
    )

  def advance(self, steps: int) -> None:
    # The first step compiles; time left is reckoned from its end.
    self._began = self._began or time.monotonic()
    self._bar.update(steps)

  def log(self, step: int, loss_nats: float, tokens_per_s: float, mfu: float | None) -> None:
    share = '' if mfu is None else f', {mfu:.1%} MFU'
    if not self._bar.disable:
      self._bar.set_postfix_str(f'loss {loss_nats:.4f}, {tokens_per_s:,.0f} tokens/s{share}')
      return
    done = max(1, step - self._first)
    left = (time.monotonic() - (self._began or time.monotonic())) / done * (self._last - step)
    say(f'step {step}/{self._last}  loss {loss_nats:.4f}  {tokens_per_s:,.0f} tokens/s{share}  {_clock(left)} left')

  def close(self) -> None:
    self._bar.close()


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
