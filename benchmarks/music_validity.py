"""How many tunes that a model of `tunes` writes are valid ABC, judged by music21, beside the held-out tunes themselves.

  pip install -e '.[bench]'
  python benchmarks/music_validity.py --workdir=runs/tunes --num_samples=200 --temperature=0.8

A text is valid where music21 parses it as ABC without an exception or a warning, it has the five headers, and at least eight notes. Of the
valid ones' measures (the first and last aside, which may be cut short) the share that lasts as long as the metre says is given too.
"""

import argparse
import collections
import contextlib
import io

import music21

from textgen_jax import compilation, workdir
from textgen_jax.data import corpora
from textgen_jax.sampling import generate, params

HEADERS = ('X:', 'T:', 'M:', 'L:', 'K:')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--num_samples', type=int, default=200)
  parser.add_argument('--max_new_tokens', type=int, default=1000)
  parser.add_argument('--temperature', type=float, nargs='*', default=[0.5, 0.8, 1.0])
  args = parser.parse_args()
  compilation.keep_compiled()
  trained = workdir.load(args.workdir)
  held_out = [''.join(part.text for part in document.parts) for document in corpora.CORPORA['tunes'].open().read('val')]
  print('| tunes | ended by themselves | valid ABC | measures of the right length | why not |\n|---|---|---|---|---|')
  report('held out (val)', held_out, len(held_out))
  for temperature in args.temperature:
    settings = params.SamplingParams(temperature=temperature, num_samples=args.num_samples, max_new_tokens=args.max_new_tokens)
    completions = generate.generate(trained.model, trained.params, trained.tokenizer, [''], settings)
    ended = sum(completion.finish_reason == 'end' for completion in completions)
    report(f'{args.num_samples} at temperature {temperature}', [completion.text for completion in completions], ended)


def report(name: str, tunes: list[str], ended: int) -> None:
  reasons, right, measures = collections.Counter(), 0, 0
  for tune in tunes:
    reason, good, count = judge(tune)
    reasons[reason] += 1
    right, measures = right + good, measures + count
  valid = reasons.pop('', 0)
  why = ', '.join(f'{reason} {count}' for reason, count in reasons.most_common())
  right_length = f'{right / max(measures, 1):.1%} of {measures:,}'
  print(f'| {name} | {ended / len(tunes):.1%} | {valid / len(tunes):.1%} | {right_length} | {why} |', flush=True)


def judge(tune: str) -> tuple[str, int, int]:
  """Why it isn't valid, '' where it is; measures of the right length, and all."""
  missing = [header for header in HEADERS if not any(line.startswith(header) for line in tune.splitlines())]
  if missing:
    return f'no {missing[0]}', 0, 0
  told = io.StringIO()
  try:
    with contextlib.redirect_stderr(told):
      score = music21.converter.parse(tune, format='abc')
    notes = len(score.recurse().notes)
    measures = [m for part in score.parts for m in list(part.getElementsByClass('Measure'))[1:-1]]
    right = sum(m.duration.quarterLength == m.barDuration.quarterLength for m in measures)
  except Exception as error:  # music21 raises its own and Python's
    return type(error).__name__, 0, 0
  if told.getvalue():  # it goes on with another note in place of the one that it couldn't read
    return 'a note that is none', 0, 0
  return ('', right, len(measures)) if notes >= 8 else ('less than 8 notes', 0, 0)


if __name__ == '__main__':
  main()
