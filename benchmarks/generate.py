"""Tokens a second beside Hugging Face `generate`, both libraries holding the same GPT-2; and what a larger cache costs.

  pip install -e '.[bench]'
  python benchmarks/generate.py [--repeats=7] [--together] [--large]

Both draw 256 tokens (--large: 64) at temperature 0.8 after prompts of 8, in turns and with another seed each time, through their public
calls: texts in and texts out for ours, ids in and ids out for theirs. First both continue the same prompts greedily, and the script ends
where their tokens differ. Each contender has a process of its own that sleeps while another is timed (--together: one process for all).
torch runs with one thread and with all cores, and ratios are to the faster of the two: two threads that wait for each other at every
operation are a little faster alone, and many times slower where another process takes a core away.

--large is GPT-2's smallest model but for its vocabulary, 85 M parameters in place of 0.8 M, beside Hugging Face's with all cores; its
capacity isn't measured.

Capacity is measured in three ways. By a model whose context is 4 C, through `generate`, for texts of 64 tokens: room that isn't used
should cost nothing. Through `generate`, whose cache follows the text: C/2 tokens drawn after C/2, less the time of a call that draws
one token, so that reading the prompt doesn't count. And with a cache of C slots whatever the text, which is always 64 tokens: the model
alone.
"""

import argparse
import functools
import importlib.metadata
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import contenders
import gpt2_weights
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from textgen_jax import allocator
from textgen_jax.models import base, build, lstm, transformer
from textgen_jax.sampling import generate, params
from textgen_jax.text import char


class Sizes(NamedTuple):
  """Of GPT-2, and of what is drawn."""

  dim: int
  num_layers: int
  num_heads: int
  new_tokens: int
  batches: tuple[int, ...]


SMALL, LARGE = Sizes(128, 4, 4, 256, (1, 16)), Sizes(768, 12, 12, 64, (1, 4, 16))
VOCAB_SIZE, CONTEXT_LENGTH = 65, 1024
PROMPT_TOKENS, GREEDY_TOKENS, TEMPERATURE = 8, 64, 0.8
CAPACITIES = (64, 128, 256, 512, 1024)
ROOMY_TOKENS = 56  # and 8 before: a quarter of the smallest context
CAPACITY_TOKENS = 512  # drawn in one measurement, whatever the capacity: else the short ones would be the noisy ones
OURS, THEIRS = 'textgen_jax, GPT-2', 'Hugging Face, GPT-2, threads: '
CORES = os.cpu_count() or 2

# (prompts_BT, new_tokens, temperature, seed) -> the new tokens of each row; prompts are ids below 64, for the last id ends a document.
Draw = Callable[[list[list[int]], int, float, int], list[list[int]]]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--repeats', type=int, default=7)
  parser.add_argument('--together', action='store_true', help='one process for all, where both libraries have their threads')
  parser.add_argument('--large', action='store_true', help='85 M parameters')
  parser.add_argument('--torch_threads', type=int, nargs='+', help='a row each: 1 and all cores, --large: all cores')
  parser.add_argument('--serve', nargs=2, metavar=('NAME', 'WEIGHTS'), help='for the script itself: time what stdin asks for')
  args = parser.parse_args()
  sizes = LARGE if args.large else SMALL
  args.torch_threads = args.torch_threads or ([CORES] if args.large else [1, CORES])
  if args.serve:
    contenders.serve(makers(sizes, args.torch_threads)[args.serve[0]](args.serve[1]))
    return
  versions = ', '.join(f'{name} {importlib.metadata.version(name)}' for name in ('jax', 'jaxlib', 'torch', 'transformers'))
  where = 'one process for all' if args.together else 'a process each'
  print(f'{CORES} cores, {where}; {versions}\n')
  with tempfile.TemporaryDirectory() as folder:
    weights = os.path.join(folder, 'gpt2.npz')
    write_weights(sizes, weights)
    rivals: dict[str, Any] = {}
    for name, make in makers(sizes, args.torch_threads).items():
      if args.together:
        rivals[name] = functools.partial(contenders.timed, make(weights))
      else:
        how = ['--torch_threads', *map(str, args.torch_threads), *['--large'] * args.large]
        rivals[name] = contenders.Apart(__file__, name, [weights, *how])
    check_same(rivals, max(sizes.batches))
    compare(rivals, sizes, args.repeats)
    for rival in rivals.values():
      if isinstance(rival, contenders.Apart):
        rival.close()
    if not args.large:
      capacity(weights, args.repeats)


def write_weights(sizes: Sizes, path: str) -> None:
  """A GPT-2 with random biases and scales too, so that none is lost unseen, and logits that are far enough apart to compare."""
  import torch

  torch.manual_seed(0)
  model = their_model(sizes)
  with torch.no_grad():
    for name, param in model.named_parameters():
      if param.ndim > 1:
        param.normal_(0.0, 0.2 * (SMALL.dim / sizes.dim) ** 0.5)  # larger ones make a chaos of rounding
      else:
        param.normal_(1.0 if name.endswith('weight') else 0.0, 0.1)
  np.savez(path, **{name: param.detach().numpy() for name, param in model.named_parameters()})  # the tied table once


def their_model(sizes: Sizes) -> Any:
  import transformers

  no_special_tokens = dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'))
  own = {'n_layer': sizes.num_layers, 'n_embd': sizes.dim, 'n_head': sizes.num_heads}
  config = transformers.GPT2Config(vocab_size=VOCAB_SIZE, n_positions=CONTEXT_LENGTH, **own, **no_special_tokens)
  return transformers.GPT2LMHeadModel(config).eval()


def theirs(sizes: Sizes, threads: int, weights: str) -> Draw:
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  model = their_model(sizes)
  with np.load(weights) as file:
    model.load_state_dict({name: torch.from_numpy(file[name]) for name in file}, strict=False)
  model.tie_weights()

  @torch.inference_mode()
  def draw(prompts: list[list[int]], new_tokens: int, temperature: float, seed: int) -> list[list[int]]:
    torch.set_num_threads(threads)  # here, for another contender of this process may have another number
    torch.manual_seed(seed)
    # Its default of the 50 likeliest is off: ours draws among all 65 too.
    how = {'do_sample': True, 'temperature': temperature, 'top_k': 0} if temperature else {'do_sample': False}
    ids = torch.tensor(prompts)
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, use_cache=True, pad_token_id=0, **how)
    return made[:, ids.shape[1] :].tolist()

  return draw


def ours(model: Any, weights: Any) -> Draw:
  tokenizer = char.CharTokenizer(''.join(map(chr, range(64, 64 + VOCAB_SIZE - 1))), '')

  def draw(prompts: list[list[int]], new_tokens: int, temperature: float, seed: int) -> list[list[int]]:
    settings = params.SamplingParams(max_new_tokens=new_tokens, temperature=temperature, seed=seed, stop_at_end=False)
    texts = [tokenizer.decode(prompt) for prompt in prompts]
    return [one.tokens for one in generate.generate(model, weights, tokenizer, texts, settings)]

  return draw


def same_gpt2(sizes: Sizes, weights: str) -> tuple[Any, Any]:
  model = build.build(gpt2_weights.config(sizes.dim, sizes.num_layers, sizes.num_heads), VOCAB_SIZE, CONTEXT_LENGTH)
  with np.load(weights) as file:
    found = dict(file)
  return model, gpt2_weights.fill(model, gpt2_weights.rename(found, sizes.num_layers))


def fresh(config: build.ModelConfig, context_length: int = CONTEXT_LENGTH) -> tuple[Any, Any]:
  model = build.build(config, VOCAB_SIZE, context_length)
  return model, nn.unbox(base.init_params(model, jax.random.PRNGKey(0)))


def modern(sizes: Sizes) -> transformer.TransformerConfig:
  return transformer.TransformerConfig(dim=sizes.dim, num_layers=sizes.num_layers, num_heads=sizes.num_heads, compute_dtype='float32')


LSTM = lstm.LSTMConfig(dim=224, num_layers=2, compute_dtype='float32')  # 0.82 M weights; the blocks of the Transformers have 0.79 M


def makers(sizes: Sizes, torch_threads: list[int]) -> dict[str, Callable[[str], Draw]]:
  """By name, in the order of their turns; each takes the path of the weights."""
  made = {
    OURS: lambda weights: ours(*same_gpt2(sizes, weights)),
    **{f'{THEIRS}{threads}': functools.partial(theirs, sizes, threads) for threads in sorted(set(torch_threads))},
    'textgen_jax, Transformer as by default': lambda _: ours(*fresh(modern(sizes))),
  }
  return made if sizes == LARGE else made | {'textgen_jax, LSTM': lambda _: ours(*fresh(LSTM))}


def prompts(batch: int, seed: int) -> list[list[int]]:
  return np.random.default_rng(seed).integers(0, VOCAB_SIZE - 1, (batch, PROMPT_TOKENS)).tolist()


def check_same(rivals: dict[str, Any], rows: int) -> None:
  """Ends the script where the two greedy continuations differ."""
  (_, mine), *others = (rivals[name](prompts(rows, 0), GREEDY_TOKENS, 0.0, 0) for name in rivals if name.startswith((OURS, THEIRS)))
  for _, other in others:
    wrong = [row for row in range(rows) if mine[row] != other[row]]
    if wrong:
      raise SystemExit(f'row {wrong[0]}: greedy tokens differ, {mine[wrong[0]]} and {other[wrong[0]]}')
  kinds = statistics.mean(len(set(row)) for row in mine)
  print(f'Greedy tokens are the same in both: {rows} rows of {GREEDY_TOKENS}, {kinds:.0f} different ones in a row.\n', flush=True)


def compare(rivals: dict[str, Any], sizes: Sizes, repeats: int) -> None:
  print(f'| model | batch | tokens/s, median of {repeats} | least to most | times Hugging Face | least to most, by turn |')
  print('|---' * 6 + '|')
  for batch in sizes.batches:
    speeds: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(-1, repeats):  # the first compiles and warms up
      for name, rival in rivals.items():
        seconds, tokens = rival(prompts(batch, turn + 1), sizes.new_tokens, TEMPERATURE, turn + 1)
        assert [len(row) for row in tokens] == [sizes.new_tokens] * batch, name
        if turn >= 0:
          speeds[name].append(batch * sizes.new_tokens / seconds)
    best = max((speeds[name] for name in rivals if name.startswith(THEIRS)), key=statistics.median)
    for name, speed in speeds.items():
      cells = [name, f'{batch}', f'{statistics.median(speed):,.0f}', f'{min(speed):,.0f} to {max(speed):,.0f}']
      ratios = [mine / other for mine, other in zip(speed, best, strict=True)]
      ratio = statistics.median(speed) / statistics.median(best)
      print('| ' + ' | '.join([*cells, f'{ratio:.2f}', f'{min(ratios):.2f} to {max(ratios):.2f}']) + ' |', flush=True)


def capacity(weights: str, repeats: int) -> None:
  """Microseconds a step, all rows together, by the cache's slots."""
  model, values = same_gpt2(SMALL, weights)
  draws = {c: ours(*fresh(modern(SMALL), 4 * c)) for c in CAPACITIES}
  kinds = {
    'context of 4 times the slots, Transformer as by default': functools.partial(roomy_us, draws),
    'text and cache grow, GPT-2': functools.partial(growing_us, ours(model, values)),
    'cache alone, GPT-2': functools.partial(forced_us, model, values),
  }
  print('\n| microseconds a step | batch | ' + ' | '.join(f'{c} slots' for c in CAPACITIES) + ' | most / least |')
  print('|---' * (len(CAPACITIES) + 3) + '|')
  for name, measure in kinds.items():
    for batch in SMALL.batches:
      times: dict[int, list[float]] = {c: [] for c in CAPACITIES}
      for turn in range(-1, repeats):
        for c in CAPACITIES:
          us = measure(batch, c, turn + 1)
          if turn >= 0:
            times[c].append(us)
      medians = [statistics.median(times[c]) for c in CAPACITIES]
      print(f'| {name} | {batch} | ' + ' | '.join(f'{us:.0f}' for us in medians) + f' | {max(medians) / min(medians):.2f} |', flush=True)


def roomy_us(draws: dict[int, Draw], batch: int, size: int, seed: int) -> float:
  """A step of `generate` on texts of 64 tokens by a model that could hold 4 C."""
  calls = CAPACITY_TOKENS // ROOMY_TOKENS
  began = time.perf_counter()
  for i in range(calls):
    draws[size](prompts(batch, seed), ROOMY_TOKENS, TEMPERATURE, seed * calls + i)
  return (time.perf_counter() - began) / (calls * ROOMY_TOKENS) * 1e6


def growing_us(draw: Draw, batch: int, size: int, seed: int) -> float:
  """A step of `generate` on texts that grow from C/2 to C tokens."""
  calls, new_tokens = CAPACITY_TOKENS // (size // 2), size // 2
  texts = np.random.default_rng(seed).integers(0, VOCAB_SIZE - 1, (batch, size // 2 + 1)).tolist()  # the last one is read as it is drawn on

  def seconds(n: int) -> float:
    began = time.perf_counter()
    for i in range(calls):
      draw(texts, n, TEMPERATURE, seed * calls + i)
    return time.perf_counter() - began

  return (seconds(new_tokens) - seconds(1)) / (calls * (new_tokens - 1)) * 1e6


def forced_us(model: Any, weights: Any, batch: int, size: int, seed: int) -> float:
  """A greedy step on texts that grow from nothing to 64 tokens in a cache of C slots."""
  token_B = jnp.full((batch,), seed % VOCAB_SIZE, jnp.int32)
  began = time.perf_counter()
  for _ in range(CAPACITY_TOKENS // CAPACITIES[0]):
    token_B, cache = continue_greedily(model, weights, token_B, model.init_cache(batch, size), CAPACITIES[0])
  jax.block_until_ready((token_B, cache))
  return (time.perf_counter() - began) / CAPACITY_TOKENS * 1e6


@functools.partial(jax.jit, static_argnames='model', donate_argnames='cache')
def continue_greedily(model: Any, weights: Any, token_B: jax.Array, cache: Any, steps: int) -> tuple[jax.Array, Any]:
  def step(_: Any, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
    logits_BV, cache = base.step_in_loop(model, weights, *carry, CAPACITIES[0])
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), cache

  return jax.lax.fori_loop(0, steps, step, (token_B, cache))


if __name__ == '__main__':
  if not any(arg.startswith(THEIRS) for arg in sys.argv):
    allocator.keep_memory()  # as sample.py does
  main()
