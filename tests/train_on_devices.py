"""Trains on fake CPU devices, as a process of its own: their number is fixed when JAX starts.

  python tests/train_on_devices.py NUM_DEVICES TEXT WORKDIR

Prints JSON: losses and places by mesh, and the errors of what doesn't fit.
"""

import dataclasses
import functools
import json
import pathlib
import re
import sys
from unittest import mock

import jax
import numpy as np

from textgen_jax import assembly, errors, sharding, trainer, trees
from textgen_jax import experiment as experiment_lib
from textgen_jax.data import corpora, tokens
from textgen_jax.models import attention_kernels, lstm, products, recurrence_kernels, transformer
from textgen_jax.text import base
from textgen_jax.training import checkpoints, evaluate, losses, optimizer, step

NUM_STEPS = 20
COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
WIDE_MESHES = {1: [(1, 1, 1)], 8: [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)]}
SCANNED_MESHES = {1: [(1, 1, 1)], 8: [(2, 2, 2)]}
# Tensor parallel: what lies between the residual stream's two ends is split, and the vocabulary.
TENSOR_RULES = sharding.ShardingConfig().rules | {name: ['fsdp'] for name in ('vocab', 'heads', 'mlp', 'gates')} | {'embed': []}


def make(
  kind, text, batch_size=8, optimizer_kind='adamw', dim=16, heads=2, data=-1, fsdp=1, tensor=1, rules=None, num_steps=NUM_STEPS, **training
):
  model = {
    'transformer': transformer.TransformerConfig(dim=dim, num_layers=1, num_heads=heads, vocab_multiple=8),
    'scanned': transformer.TransformerConfig(dim=dim, num_layers=3, num_heads=heads, vocab_multiple=8, remat='full', scan_layers=True),
    'lstm': lstm.LSTMConfig(dim=dim, num_layers=1, vocab_multiple=8),
    'deep lstm': lstm.LSTMConfig(dim=dim, num_layers=2, vocab_multiple=8),
  }[kind]
  places = sharding.ShardingConfig(data=data, fsdp=fsdp, tensor=tensor)
  return experiment_lib.Experiment(
    data=corpora.DataConfig(path=str(text)),
    tokenizer=base.TokenizerConfig(kind='char'),
    model=model,
    optimizer=optimizer.OptimizerConfig(kind=optimizer_kind, peak_lr=1e-2, warmup_steps=2, schedule_steps=NUM_STEPS),
    sharding=places if rules is None else dataclasses.replace(places, rules=rules),
    training=experiment_lib.TrainingConfig(
      num_steps=num_steps,
      batch_size=batch_size,
      sequence_length=8,
      windows='contiguous' if 'lstm' in kind else 'random',
      log_every_steps=1,
      eval_every_steps=0,
      sample_tokens=0,
      **training,
    ),
  )


def assemble(experiment):
  return assembly.Parts(experiment, pathlib.Path('nowhere'), step.no_hook)


def losses_and_places(experiment):
  parts = assemble(experiment)
  state, found = parts.init(), []
  for span in step.spans(0, NUM_STEPS, experiment.training.steps_per_dispatch, lambda done: False):
    state, sums = parts.step(state, *parts.inputs([done - 1 for done in span]))
    found += [step.means(one)['loss'] for one in step.each(sums, len(span))]
  places = {name: [leaf.shape, leaf.addressable_shards[0].data.shape] for name, leaf in trees.named_leaves(state)}
  return {'losses': found, 'places': places}


def wide(kind, text, sizes):
  """A model that eight devices divide along every axis, and what its devices say to each other."""
  data, fsdp, tensor = sizes
  experiment = make(kind, text, dim=32, heads=8, data=data, fsdp=fsdp, tensor=tensor)
  parts = assemble(experiment)
  program = parts.step.lower(checkpoints.with_shardings(parts.abstract, parts.shardings), *parts.inputs([0])).compile().as_text()
  said = {name: program.count(f' {name}(') + program.count(f' {name}-start(') for name in COLLECTIVES}
  gathered = re.findall(r'\[([\d,]+)\][^=]* all-gather(?:-start)?\(', program)
  return losses_and_places(experiment) | {'collectives': said, 'gathered': sorted(set(gathered))}


def scores(experiment):
  """Losses of documents, by how they are read; params and text are the same on every mesh."""
  parts = assemble(experiment)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: (0.3 * rng.standard_normal(x.shape)).astype(x.dtype), parts.abstract.params)
  params = jax.device_put(params, parts.shardings.params)
  end = parts.tokenizer.special_ids['end_of_text']
  ids = rng.integers(0, end, 150).astype(np.uint8)
  starts = np.array([0, 5, 40, 41, 100])
  ids[[*starts, -1]] = end
  documents = np.zeros(5, tokens.DOCUMENT)
  documents['start'], documents['tokens'] = starts, np.diff([*starts, 149])
  split = tokens.Split(ids, documents, (tokens.Range(0, 150, 1.0),))
  readings = {
    'rows': evaluate.Reading(length=8),
    'overlapping': evaluate.Reading(length=8, stride=3),
    'masked': evaluate.Reading(length=8, stride=3, end_of_text=end),
  }
  if parts.model.window is None:
    readings['carried'] = evaluate.Reading(length=8, carried=True, end_of_text=end)
  # 19 rows or 49: no number of devices divides them.
  how = {'batch_size': 2 * parts.row_ways, 'divisor': parts.row_ways, 'put': parts.put}
  return {name: evaluate.evaluate(parts.free_model, params, split, reading, **how).nll_sums.tolist() for name, reading in readings.items()}


def split_rows():
  """A TPU's kernel, interpreted, each device on its own rows; beside it on all rows at once."""
  config = sharding.ShardingConfig()
  constrain = sharding.make_constrain(config, sharding.make_mesh(config))
  rng = np.random.default_rng(0)
  q_BTHK = rng.normal(size=(4, 128, 2, 8)).astype(np.float32)
  k_BGSK, v_BGSK = rng.normal(size=(2, 4, 1, 128, 8)).astype(np.float32)
  sight = attention_kernels.Sight(128, rng.integers(3, size=(4, 128), dtype=np.int32))
  attend = functools.partial(attention_kernels.splash, interpret=True)
  found = {'ways': constrain.ways('batch')}
  queries, keys = ('batch', None, 'heads'), ('batch', 'heads')
  split = constrain.split(attend, (queries, keys, keys, ('batch',)), queries)
  for name, function in {'split': split, 'whole': attend}.items():
    grads = jax.jit(jax.grad(lambda *a, f=function: (f(*a, sight) ** 2).sum(), argnums=(0, 1, 2)))(q_BTHK, k_BGSK, v_BGSK)
    found[name] = [np.asarray(x)[:, ::7].ravel()[::31].tolist() for x in grads]
  return found


def split_recurrence():
  """A GPU's kernel, interpreted, each device on its own rows; beside it on all rows at once."""
  config = sharding.ShardingConfig()
  rng = np.random.default_rng(0)
  gates_TBG, bias_G, kernel_DG = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 4, 32), (32,), (8, 32)))
  carry, keep_BD = tuple(rng.normal(size=(2, 4, 8)).astype(np.float32)), np.float32(2 * (rng.random((4, 8)) < 0.5))
  starts_TB = rng.random((5, 4)) < 0.3
  found = {}
  for name, constrain in {'split': sharding.make_constrain(config, sharding.make_mesh(config)), 'whole': None}.items():

    def total(gates_TBG, bias_G, kernel_DG, carry, constrain=constrain):
      loop = gates_TBG, bias_G, kernel_DG, carry, keep_BD, starts_TB, constrain
      hidden_TBD, last = recurrence_kernels.apply(*loop, interpret=True)
      return (hidden_TBD**2).sum() + last[0].sum() + (last[1] ** 3).sum()

    grads = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(gates_TBG, bias_G, kernel_DG, carry)
    found[name] = [np.asarray(x).ravel().tolist() for x in jax.tree.leaves(grads)]
  return found


def complaint(experiment):
  try:
    assemble(experiment)
  except errors.UserError as error:
    return str(error)
  return None


def main(num_devices, text, workdir):
  jax.config.update('jax_num_cpu_devices', num_devices)
  jax.config.update('jax_disable_most_optimizations', True)
  found = {}
  for sizes in WIDE_MESHES.get(num_devices, []):
    for kind in ('transformer', 'deep lstm'):
      found[f'wide {kind} {"x".join(map(str, sizes))}'] = wide(kind, text, sizes)
  for sizes in SCANNED_MESHES.get(num_devices, []):
    found[f'wide scanned {"x".join(map(str, sizes))}'] = wide('scanned', text, sizes)
  if num_devices == 8:
    print(json.dumps(found))
    return
  meshes = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(4, 1), (1, 4), (2, 2)]}[num_devices]
  for kind in ('transformer', 'lstm'):
    for data, fsdp in meshes:
      found[f'{kind} {data}x{fsdp}'] = losses_and_places(make(kind, text, data=data, fsdp=fsdp))
      found[f'{kind} {data}x{fsdp}']['scores'] = scores(make(kind, text, data=data, fsdp=fsdp))
  data, fsdp = meshes[-1]
  found['muon'] = losses_and_places(make('transformer', text, data=data, fsdp=fsdp, optimizer_kind='muon'))
  for kind in ('transformer', 'lstm'):
    found[f'rounded {kind}'] = losses_and_places(make(kind, text, data=data, fsdp=fsdp, product_dtype='bfloat16'))
  if num_devices == 2:
    with mock.patch.multiple(products, MIN_SIDE=1, SIDE_PER_ROW=1, MIN_TURNS=1):
      found['by columns'] = losses_and_places(make('lstm', text))
    found['split rows'] = split_rows()
    found['split recurrence'] = split_recurrence()
    found['transformer tensor'] = losses_and_places(make('transformer', text, data=1, fsdp=2, rules=TENSOR_RULES))
    found['lstm tensor'] = losses_and_places(make('lstm', text, data=1, fsdp=2, rules=TENSOR_RULES))
    found['transformer 2x1 accumulated'] = losses_and_places(make('transformer', text, data=2, accumulation_steps=2))
  if num_devices == 4:
    few = 4 * 2 * 3 * 24  # logits of three tokens, of the two rows of a device
    with mock.patch.object(losses, 'MOST_LOGITS_BYTES_ON_CPU', few):
      found['transformer 2x2 in chunks and dispatches'] = losses_and_places(make('transformer', text, data=2, fsdp=2, steps_per_dispatch=8))
  found['errors'] = {
    'batch': complaint(make('lstm', text, batch_size=6)),
    'micro-batch': complaint(make('lstm', text, batch_size=8, accumulation_steps=4)),
    'param': complaint(make('lstm', text, dim=18, fsdp=num_devices)),
    'rest': complaint(make('lstm', text, data=-1, fsdp=3)),
    'sizes': complaint(make('lstm', text, data=3)),
  }
  # One run that goes on where a process with another number of devices left it, and writes a sample at its end.
  experiment = make('lstm', text, fsdp=num_devices, num_steps=5 * num_devices, sample_every_steps=5 * num_devices)
  experiment.training.sample_tokens = 2
  trainer.train(experiment, workdir)
  print(json.dumps(found))


if __name__ == '__main__':
  main(int(sys.argv[1]), *sys.argv[2:])
