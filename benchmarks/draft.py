"""What a draft model saves: tokens a second with and without it, and how many of its guesses hold.

  python benchmarks/draft.py --workdir=runs/shakespeare --draft=runs/small [--repeats=5]

Texts of 256 tokens are drawn at temperature 0.8 in turns, plain and with 1 to 4 guesses at a time, each turn with another seed. A
round is one call of the model; without a draft it gives one token.
"""

import argparse
import statistics
import time

from textgen_jax.generator import Generator
from textgen_jax.sampling import batch as batch_lib
from textgen_jax.sampling import sampler
from textgen_jax.sampling.params import SamplingParams

NEW_TOKENS, TEMPERATURE = 256, 0.8
BATCHES, GUESSES = (1, 16), (0, 1, 2, 3, 4)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--draft', required=True)
  parser.add_argument('--repeats', type=int, default=5)
  args = parser.parse_args()
  generator = Generator.load(args.workdir, draft=args.draft)
  print(f'| batch | guesses | tokens/s, median of {args.repeats} | least to most | times plain | tokens a round |')
  print('|---' * 6 + '|')
  for size in BATCHES:
    speeds: dict[int, list[float]] = {guesses: [] for guesses in GUESSES}
    rounds = dict.fromkeys(GUESSES, 0)
    for turn in range(-1, args.repeats):  # the first compiles
      for guesses in GUESSES:
        seconds, played = draw(generator, size, guesses, turn + 1)
        if turn >= 0:
          speeds[guesses].append(size * NEW_TOKENS / seconds)
          rounds[guesses] += played
    plain = statistics.median(speeds[0])
    for guesses, speed in speeds.items():
      median = statistics.median(speed)
      a_round = args.repeats * size * NEW_TOKENS / rounds[guesses] if guesses else 1
      spread = f'{min(speed):,.0f} to {max(speed):,.0f}'
      cells = f'{size}', f'{guesses}', f'{median:,.0f}', spread, f'{median / plain:.2f}', f'{a_round:.2f}'
      print('| ' + ' | '.join(cells) + ' |', flush=True)


def draw(generator: Generator, size: int, guesses: int, seed: int) -> tuple[float, int]:
  """Seconds, and rounds of all rows."""
  settings = [SamplingParams(max_new_tokens=NEW_TOKENS, temperature=TEMPERATURE, seed=seed, stop_at_end=False)] * size
  draft = generator.draft._replace(tokens=guesses) if generator.draft and guesses else None
  batch = batch_lib.prepare(generator.model, generator.params, generator.tokenizer, [''] * size, settings, draft)
  began = time.perf_counter()
  rows = sampler.Sampler(generator.model, generator.params, batch.ids, settings, range(size), batch.vocab, draft=draft)
  made = sum(len(new.tokens) for segment in rows for new in segment.values())
  assert made == size * NEW_TOKENS
  return time.perf_counter() - began, rows.rounds


if __name__ == '__main__':
  main()
