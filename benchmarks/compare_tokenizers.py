"""Every kind of tokenizer with each model family on `shakespeare`, at equal training FLOPs: bits per byte of the test split.

  python benchmarks/compare_tokenizers.py --workdirs=runs/tokenizers [--tflops=16] [--split=test]

Each run is a shipped configuration with the flags that stand below, trained for as many steps as the budget
allows (6 FLOPs a weight and token, attention counted: models.base.flops_per_token). What was chosen for a run, learning
rate and sizes, was chosen on val. A run whose workdir is finished already is only scored.
"""

import argparse
import copy
import json
import pathlib
import subprocess
import sys

import jax
from flax import linen as nn

from textgen_jax import command_line
from textgen_jax.data import prepare
from textgen_jax.models import base, build

ROOT = pathlib.Path(__file__).resolve().parent.parent
UNTIED = ['model.tied_embedding=False']  # large vocabularies want an output table of their own: 2.79 where tied 3.38 (words, val)
# Kind, family, configuration, flags.
RUNS = (
  ('char', 'Transformer', 'shakespeare_char', []),
  ('byte', 'Transformer', 'shakespeare_char', ['tokenizer.kind=byte']),
  ('word', 'Transformer', 'shakespeare_word', []),
  ('sentencepiece', 'Transformer', 'shakespeare_sentencepiece', []),
  ('char', 'LSTM', 'shakespeare_lstm', []),
  ('byte', 'LSTM', 'shakespeare_lstm', ['tokenizer.kind=byte']),
  ('word', 'LSTM', 'shakespeare_word_lstm', []),
  ('sentencepiece', 'LSTM', 'shakespeare_lstm', ['tokenizer.kind=sentencepiece', 'tokenizer.vocab_size=2048', *UNTIED, 'model.dim=384']),
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdirs', default='runs/tokenizers')
  parser.add_argument('--tflops', type=float, default=16.0, help='of training, each')
  parser.add_argument('--split', default='test')
  parser.add_argument('--only', nargs='*', default=[], help='such as char-LSTM')
  args = parser.parse_args()
  print('| tokenizer | model | ids | parameters | tokens trained on | nats/token | word perplexity | bits per byte |\n|' + '---|' * 8)
  for kind, family, config, chosen in RUNS:
    if args.only and f'{kind}-{family}' not in args.only:
      continue
    chosen = [f'--config.{flag}' for flag in chosen]
    path, workdir = f'configs/{config}.py', pathlib.Path(args.workdirs, f'{kind}_{family.lower()}')
    steps, tokens, parameters, ids = budget(path, chosen, args.tflops * 1e12)
    flags = [*chosen, f'--config.training.num_steps={steps}', '--config.training.sample_tokens=0']
    flags += [f'--config.training.{name}_every_steps=0' for name in ('eval', 'checkpoint')]
    run('train.py', f'--config={path}', f'--workdir={workdir}', *flags)
    score = json.loads(run('-m', 'textgen_jax.tools.evaluate', f'--workdir={workdir}', '--checkpoint=latest', f'--split={args.split}'))
    cells = (
      kind, family, f'{ids:,}', f'{parameters / 1e6:.2f} M', f'{tokens / 1e6:.2f} M', f'{score["loss_nats"]:.3f}',
      f'{score["word_perplexity"]:,.0f}', f'{score["bits_per_byte"]:.3f} ± {score["bits_per_byte_stderr"]:.3f}',
    )  # fmt: skip
    print('| ' + ' | '.join(cells) + ' |', flush=True)


def budget(config: str, flags: list[str], flops: float) -> tuple[int, int, int, int]:
  """Steps and tokens that the budget allows; the model's parameters and ids."""
  experiment, _ = command_line.parse_experiment(['train.py', f'--config={config}', '--workdir=unused', *flags])
  c = experiment.training
  vocab_size = prepare.prepare(experiment.data, experiment.tokenizer).tokenizer.vocab_size
  model = build.build(copy.deepcopy(experiment.model), vocab_size, c.sequence_length)
  params = nn.unbox(jax.eval_shape(lambda: base.init_params(model, jax.random.PRNGKey(0))))
  steps = round(flops / base.flops_per_token(model, params, c.sequence_length) / (c.batch_size * c.sequence_length))
  return steps, steps * c.batch_size * c.sequence_length, sum(leaf.size for leaf in jax.tree.leaves(params)), vocab_size


def run(*command: str) -> str:
  done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
  if done.returncode:
    raise SystemExit(f'{" ".join(command)} ended with {done.returncode}: {done.stderr[-500:]}')
  return done.stdout


if __name__ == '__main__':
  main()
