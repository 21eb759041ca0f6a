"""Whether a configuration fits devices that aren't here, how it is split over them, and how long it would take.

  python -m textgen_jax.tools.plan --config=configs/modern_7b.py --topology=v5e:16x16
  python -m textgen_jax.tools.plan --config=configs/gpt2_124m.py --topology=h100:1x1 --compile

It needs no accelerator. Parameters, optimizer state and carry are counted exactly, as each device holds them; activations,
logits and communication by formula; time from the makers' data sheets, with products at half of the peak. --compile compiles
the training step for those devices too, and shows the compiler's own memory and collectives beside the plan's: for TPUs that takes
libtpu, for GPUs the CUDA plugin, and neither a device. cpu:N is as many processes' worth of this machine, to try a mesh.

Where it doesn't fit, the exit code is 2, and the last line says which settings would, found by trying them. The
vocabulary is --vocab_size, or what the tokenizer has whatever its text: bytes, or a tokenizer.vocab_size.
"""

from textgen_jax import signals

if __name__ == '__main__':
  signals.watch()  # before anything that takes its time to import

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from textgen_jax import command_line, errors

if TYPE_CHECKING:  # what imports JAX is imported where it is used, after the flags are checked
  from textgen_jax import experiment as experiment_lib
  from textgen_jax.planning import devices

FORMATS = ('text', 'json')


def main(argv: Sequence[str]) -> int:
  return command_line.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
  values = flags.FlagValues()
  flags.DEFINE_string('config', None, 'a file of configs/; any field of it is set by --config.FIELD=VALUE', flag_values=values)
  topologies = 'v5e:16x16, v5p:8x8x8, v6e:4x8; h100:8x32, a100:8x1 (GPUs a host x hosts); cpu:8'
  flags.DEFINE_string('topology', None, topologies, flag_values=values)
  flags.DEFINE_bool('compile', False, 'compile the step for these devices, and compare', flag_values=values)
  flags.DEFINE_integer('vocab_size', 0, 'ids of the tokenizer; 0: what its configuration fixes', flag_values=values)
  flags.DEFINE_integer('tokens', 0, 'to train on; 0: those of training.num_steps', flag_values=values)
  flags.DEFINE_string('format', 'text', 'text or json', flag_values=values)
  overrides = command_line.overrides(argv)
  if not command_line.parsed(values, [arg for arg in argv if arg not in overrides], __doc__):
    return
  if not values.topology:
    raise errors.UserError('--topology is missing: name the devices, such as --topology=v5e:2x4 or --topology=h100:8x1')
  if values.format not in FORMATS:
    raise errors.not_among('format', values.format, FORMATS)
  for name in ('vocab_size', 'tokens'):
    if getattr(values, name) < 0:
      raise errors.UserError(f'{name}={getattr(values, name)} is below 0')
  from textgen_jax import experiment as experiment_lib
  from textgen_jax.planning import ahead, devices, estimate, report

  topology = devices.parse(values.topology)
  experiment = command_line.experiment_of(values.config, overrides)
  experiment_lib.check(experiment)
  vocab_size = values.vocab_size or fixed_vocabulary(experiment)
  ahead.stay_here(topology)
  experiment, note = ahead.stand_in(experiment_lib.resolve(experiment), topology.device.kind)
  plan = estimate.make(experiment, vocab_size, topology)
  compiled, refused = None, ''
  if values.compile:
    try:
      compiled = ahead.compile_step(experiment, vocab_size, topology)
    except errors.MachineFailed as error:
      refused = str(error)
  told = report.content(experiment, topology, plan, values.tokens, compiled, note)
  print(json.dumps(told) if values.format == 'json' else report.text(told), flush=True)
  _check_fit(experiment, vocab_size, topology, plan.footprint.peak, compiled.peak_bytes if compiled else 0, refused)


def fixed_vocabulary(experiment: 'experiment_lib.Experiment') -> int:
  """The ids that a tokenizer has whatever its text; raises UserError where only the text would tell."""
  from textgen_jax.text import byte

  c = experiment.tokenizer
  if c.kind == 'byte':
    return byte.ByteTokenizer.vocab_size
  if not c.vocab_size:
    raise errors.UserError(f'--vocab_size is missing: tokenizer.kind={c.kind!r} has as many ids as its text makes it')
  return c.vocab_size


def _check_fit(
  experiment: 'experiment_lib.Experiment', vocab_size: int, topology: 'devices.Topology', planned: int, compiled: int, refused: str
) -> None:
  from textgen_jax.planning import remedies

  has, needs = topology.device.memory_bytes, max(planned, compiled)
  if refused or (has is not None and needs > has):
    why = refused or f'{needs / 2**30:.4g} GiB of {(has or 0) / 2**30:.4g} GiB on each device'
    # A compiler that has refused the program takes at least all that there is.
    factor = max(1.0, (max(needs, has or 0) if refused else needs) / planned)
    raise errors.UserError(f"doesn't fit: {why}; {remedies.advice(experiment, vocab_size, topology, factor)}")


if __name__ == '__main__':
  sys.exit(main(sys.argv))
