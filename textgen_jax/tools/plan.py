"""Whether a configuration fits devices that aren't here, how it is split over them, and how long it would take.

  python -m textgen_jax.tools.plan --config=configs/modern_7b.py --topology=v5e:16x16
  python -m textgen_jax.tools.plan --config=configs/gpt2_124m.py --topology=h100:1x1 --compile

It needs no accelerator. Parameters, optimizer state and carry are counted exactly, as each device holds them; activations,
logits and communication by formula; time from the makers' data sheets, with products at half of the peak. --compile compiles
the training step for those devices too, and shows the compiler's own memory and collectives beside the plan's: for TPUs that takes
libtpu, for GPUs the CUDA plugin, and neither a device. cpu:N is as many processes' worth of this machine, to try a mesh.

Where it doesn't fit, the exit code is 2, and the last line says which settings would, found by trying them. The
vocabulary is what the tokenizer has whatever its text, bytes or a tokenizer.vocab_size; else --vocab_size.
"""

from textgen_jax import signals

if __name__ == '__main__':
  signals.watch()  # before anything that takes its time to import

import decimal
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
MOST_TOKENS = 10**18  # some thousand times what all people have written
FEWEST_IDS, MOST_IDS = 2, 2**31  # ids are int32


def main(argv: Sequence[str]) -> int:
  return command_line.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
  values = flags.FlagValues()
  flags.DEFINE_string('config', None, 'a file of configs/; any field of it is set by --config.FIELD=VALUE', flag_values=values)
  topologies = 'v5e:16x16, v5p:8x8x8, v6e:4x8; h100:8x32, a100:8x1 (GPUs a host x hosts); cpu:8'
  flags.DEFINE_string('topology', None, topologies, flag_values=values)
  flags.DEFINE_bool('compile', False, 'compile the step for these devices, and compare', flag_values=values)
  flags.DEFINE_integer('vocab_size', 0, 'ids of the tokenizer; 0: what its configuration fixes', flag_values=values)
  flags.DEFINE_string('tokens', '0', 'to train on, such as 1e12; 0: those of training.num_steps', flag_values=values)
  flags.DEFINE_string('format', 'text', 'text or json', flag_values=values)
  overrides = command_line.overrides(argv)
  if not command_line.parsed(values, [arg for arg in argv if arg not in overrides], __doc__):
    return
  if not values.topology:
    raise errors.UserError('--topology is missing: name the devices, such as --topology=v5e:2x4 or --topology=h100:8x1')
  if values.format not in FORMATS:
    raise errors.not_among('format', values.format, FORMATS)
  tokens = _count('tokens', values.tokens, MOST_TOKENS)
  if not 0 <= values.vocab_size < MOST_IDS:
    raise errors.UserError(f'vocab_size={values.vocab_size} is not in [0, 2**31)')
  from textgen_jax import experiment as experiment_lib
  from textgen_jax.planning import ahead, devices, estimate, report

  topology = devices.parse(values.topology)
  experiment = command_line.experiment_of(values.config, overrides)
  experiment_lib.check(experiment)
  vocab_size = vocabulary(experiment, values.vocab_size)
  ahead.stay_here(topology)
  experiment, note = ahead.stand_in(experiment_lib.resolve(experiment), topology)
  plan = estimate.make(experiment, vocab_size, topology)
  told = report.content(experiment, topology, plan, tokens, note)
  as_text = values.format == 'text'
  if as_text:
    print(report.text(told), flush=True)  # compiling may take minutes
  compiled, refused = None, ''
  if values.compile:
    ahead.check_host(topology, plan.footprint.peak)
    print(f'compiling for {topology.name}', file=sys.stderr, flush=True)
    try:
      compiled = ahead.compile_step(experiment, vocab_size, topology)
    except errors.MachineFailed as error:
      refused = str(error)
  if compiled:
    told['compiled'] = report.compiled_content(plan, compiled)
    if as_text:
      print(report.compiled_text(told['compiled']), flush=True)
  if not as_text:
    print(json.dumps(told), flush=True)
  _check_fit(experiment, vocab_size, topology, plan.footprint.peak, compiled.peak_bytes if compiled else 0, refused)


def vocabulary(experiment: 'experiment_lib.Experiment', given: int) -> int:
  """The ids that a tokenizer has whatever its text, or those that are `given`; 0: none are.

  Raises:
    UserError: only the text would tell, or the tokenizer has others.
  """
  from textgen_jax.text import byte

  c, multiple = experiment.tokenizer, experiment.model.vocab_multiple
  fixed = byte.ByteTokenizer.vocab_size if c.kind == 'byte' else c.vocab_size
  if given and fixed and given != fixed:
    whose = 'bytes' if c.kind == 'byte' else f'tokenizer.vocab_size={c.vocab_size}'
    raise errors.UserError(f'vocab_size={given} is not the {fixed} ids of tokenizer.kind={c.kind!r} ({whose}): leave it out or change them')
  size = given or fixed
  if not size:
    raise errors.UserError(f'--vocab_size is missing: tokenizer.kind={c.kind!r} has as many ids as its text makes it')
  if size < FEWEST_IDS:
    raise errors.UserError(f'vocab_size={size} is below {FEWEST_IDS}: a character, and the end of a text')
  if -(-size // multiple) * multiple >= MOST_IDS:
    raise errors.UserError(f'vocab_size={size}, padded to a multiple of model.vocab_multiple={multiple}, is not below 2**31')
  return size


def _count(name: str, text: str, most: int) -> int:
  """A whole number of at least 0, written as 1000000000 or 1e9."""
  try:
    number = decimal.Decimal(text if text.isascii() else '')
  except decimal.InvalidOperation:
    number = decimal.Decimal('NaN')
  if not number.is_finite():
    raise errors.UserError(f'{name}={text!r} is not a number, such as 1000000000 or 1e9')
  if number < 0:
    raise errors.UserError(f'{name}={text} is below 0')
  if number > most:
    raise errors.UserError(f'{name}={text} is above {most:.0e}')
  if number != int(number):
    raise errors.UserError(f'{name}={text} is not a whole number')
  return int(number)


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
