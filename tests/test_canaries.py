"""A model that learned random strings by heart is made to say them, and is found out."""

import string

import conftest
import numpy as np

import train
from textgen_jax import workdir
from textgen_jax.sampling import generate, params
from textgen_jax.statistics import copies

LETTERS = list(string.ascii_letters)
PREFIX = 12  # characters of a canary that call it up, and what stands before it


def test_every_canary_that_a_model_says_is_found_in_its_place(tmp_path):
  generator = np.random.default_rng(0)

  def random_text(size):
    return ''.join(generator.choice(LETTERS, size))

  canaries = [random_text(72) for _ in range(20)]
  texts, places = [], {}
  for document in range(4):
    text = ''
    for canary in canaries[document::4]:
      text += random_text(generator.integers(15, 30)) + '\n'
      places[canary] = (document, len(text))
      text += canary + '\n'
    texts.append(text)
  for document, text in enumerate([*texts, random_text(200)]):  # the last is held out
    (tmp_path / f'{document}.txt').write_text(text)
  flags = {
    'data.val_fraction': 0.05, 'model.dim': 64, 'model.num_layers': 2, 'model.num_heads': 4,
    'optimizer.peak_lr': 1e-2, 'optimizer.warmup_steps': 20,
    'training.num_steps': 400, 'training.batch_size': 16, 'training.sequence_length': 64,
    'training.log_every_steps': 100, 'training.eval_every_steps': 0, 'training.checkpoint_every_steps': 0,
  }  # fmt: skip
  argv = conftest.train_argv(tmp_path / 'run', tmp_path / '?.txt', *(f'--config.{name}={value}' for name, value in flags.items()))
  assert train.main(argv) == 0
  trained = workdir.load(tmp_path / 'run', 'latest')
  prompts = [texts[document][offset - PREFIX : offset + PREFIX] for document, offset in map(places.get, canaries)]
  settings = params.SamplingParams(temperature=0, max_new_tokens=72 - PREFIX)
  said = generate.generate(trained.model, trained.params, trained.tokenizer, prompts, settings)
  index = copies.CopyIndex([(str(number), text) for number, text in enumerate(texts)])
  for canary, completion in zip(canaries, said, strict=True):
    emitted = completion.prompt[-PREFIX:] + completion.text
    assert emitted == canary  # it was learned
    (copy,) = index.copies(emitted, at_least=50)
    document, offset = places[canary]
    assert (copy.document, copy.document_offset, copy.text) == (str(document), offset, canary)
  shuffled = ''.join(generator.permutation(list(''.join(canaries))))
  assert index.copies(shuffled, at_least=50) == []
