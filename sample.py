"""Writes text with a trained model.

  python sample.py --workdir=runs/shakespeare --prompt='ROMEO:' --temperature=0.8 --num_samples=3

Results go to stdout (or --output), diagnostics to stderr. Equal flags give equal text.
"""

from textgen_jax import allocator, signals

if __name__ == '__main__':
  allocator.keep_memory()  # before any thread, of which a watch is one
  signals.watch()  # before anything that takes its time to import

import dataclasses
import os
import pathlib
import signal
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from textgen_jax import command_line, errors, interactive
from textgen_jax.sampling import journal, params
from textgen_jax.sampling import prompts as prompts_lib

if TYPE_CHECKING:  # what takes seconds to import is imported where it is used, after the flags are checked
  from textgen_jax import generator
  from textgen_jax.sampling.generate import Completion


def main(argv: Sequence[str]) -> int:
  return command_line.run(_main, argv, 'a smaller batch_size, num_samples, num_beams or max_new_tokens takes less')


def _define_flags() -> flags.FlagValues:
  values = flags.FlagValues()
  command_line.define_model_flags(values)
  text = {
    'prompts_file': (None, 'prompts from a file: .txt, a line each, or .jsonl, {"prompt": ...} each; -: lines of stdin'),
    'format': ('text', 'text (prompt and continuation, results set apart by ---) or jsonl'),
    'output': (None, 'a new file to write to instead of stdout; as jsonl it goes on where a run was stopped'),
    'manifest': (None, 'a new file for what it takes to write the texts again: hashes, versions, settings'),
    'reproduce': (None, 'a manifest, whose texts are written again and compared'),
    'draft': (None, 'the workdir of a smaller model of the same tokenizer, which guesses ahead; the texts are distributed as without it'),
  }
  for name, (default, help_text) in text.items():
    flags.DEFINE_string(name, default, help_text, flag_values=values)
  comments = command_line.field_comments(params.SamplingParams)
  define = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
  for field in dataclasses.fields(params.SamplingParams):
    if field.type in define and field.name != 'begins_document':
      define[field.type](field.name, field.default, comments[field.name], flag_values=values)
  for name in ('stop', 'choices'):
    flags.DEFINE_multi_string(name, [], comments[name] + '; may be repeated', flag_values=values)
  for name in ('stop_tokens', 'banned_tokens'):
    flags.DEFINE_list(name, [], comments[name] + '; with commas between them', flag_values=values)
  flags.DEFINE_list('logit_bias', [], 'nats added to the logits of token ids: 17:2.5,18:-1', flag_values=values)
  flags.DEFINE_multi_string('prompt', [], 'what the text begins with; may be repeated; none: a document start', flag_values=values)
  ahead, most = 'guessed at a time by the draft', params.MAX_DRAFT_TOKENS
  flags.DEFINE_integer('draft_tokens', params.DRAFT_TOKENS, ahead, lower_bound=1, upper_bound=most, flag_values=values)
  flags.DEFINE_integer('batch_size', params.BATCH_SIZE, 'texts at a time; those of one prompt stay together', flag_values=values)
  switches = {
    'begins_document': (None, 'the prompt begins a document; not given: if the model was trained on documents apart'),
    'stream': (False, 'show one text as it is made'),
    'interactive': (False, 'prompts and changes of settings, a line at a time'),
  }
  for name, (on, help_text) in switches.items():
    flags.DEFINE_bool(name, on, help_text, flag_values=values)
  return values


def _main(argv: Sequence[str]) -> None:
  values = _define_flags()
  if not command_line.parsed(values, argv, __doc__):
    return
  command_line.need_workdir(values)
  if values.format not in ('text', 'jsonl'):
    raise errors.not_among('format', values.format, ('text', 'jsonl'))
  if not values.draft:
    _refuse_given(values, ['draft_tokens'], 'without --draft nothing is guessed')
  for name in ('output', 'manifest', 'reproduce', 'prompts_file', 'draft'):
    if values[name].present and not values[name].value:
      raise errors.UserError(f'{name} is empty: name a file, or leave it out')
  for name in ('output', 'manifest'):
    if values[name].value:
      journal.check_new(name, values[name].value)
  if values.reproduce:
    _reproduce(values)
    return
  settings = _settings(values)
  prompts = _prompts(values)
  _check_shown(values, prompts, settings)
  source = _load(values, values.checkpoint)
  if values.begins_document is not None:
    source.begins_document = values.begins_document
  _tell_past_context(source, source.longest(prompts, settings))
  if values.interactive:
    interactive.run(source, settings, interactive.read_lines(), lambda piece: write_stream([piece]))
  elif values.stream:
    pieces = source.stream(prompts[0], settings)
    write_stream([prompts[0]])
    write_stream(pieces)
    write_stream(['\n'])
  else:
    _write_all(values, source, prompts, settings)


def _load(values: flags.FlagValues, checkpoint: str) -> 'generator.Generator':
  from textgen_jax import compilation, generator

  compilation.keep_compiled()
  source = generator.Generator.load(values.workdir, checkpoint, values.draft, values.draft_tokens)
  signals.unwatch()  # from here on there are texts: Ctrl-C ends one, or what is made so far is written
  return source


def _prompts(values: flags.FlagValues) -> list[str]:
  if values.prompt and values.prompts_file:
    raise errors.UserError('--prompt and --prompts_file: give one of them')
  if not values.prompts_file:
    return values.prompt or ['']
  return prompts_lib.read_stdin() if values.prompts_file == '-' else prompts_lib.read(pathlib.Path(values.prompts_file))


def _check_shown(values: flags.FlagValues, prompts: Sequence[str], settings: params.SamplingParams) -> None:
  """Refuses flags that the way of showing the text can't follow."""
  params.check_batch_size(values.batch_size)
  if values.manifest and values.output and os.path.realpath(values.manifest) == os.path.realpath(values.output):
    raise errors.UserError(f'manifest={values.manifest!r} is the output too: name two files')
  if values.interactive:
    unread = ('prompt', 'prompts_file', 'format', 'output', 'manifest', 'stream', 'batch_size', *interactive.UNREAD)
    _refuse_given(values, unread, '--interactive writes one text after the other to stdout')
  elif values.stream and (len(prompts) > 1 or settings.num_samples > 1 or values.format != 'text' or values.output or values.manifest):
    what = 'the other prompts, num_samples, format, output or manifest'
    raise errors.UserError(f'--stream shows one sample of one prompt as text: drop {what}')


def _refuse_given(values: flags.FlagValues, names: Iterable[str], why: str) -> None:
  given = [name for name in names if values[name].present]
  if given:
    raise errors.UserError(f'{why}: drop --{given[0]}')


def _write_all(values: flags.FlagValues, source: 'generator.Generator', prompts: list[str], settings: params.SamplingParams) -> None:
  if values.output and values.format == 'jsonl':
    _generate_to(values, source, prompts, settings)
  else:
    completions = _generate(values, source, prompts, settings)
    if values.format == 'jsonl':
      lines = [journal.line(c.row()) for c in completions]
    else:
      lines = [('---\n' if i else '') + f'{c.prompt}{c.text}\n' for i, c in enumerate(completions)]
    _write('output', values.output, lines)
  if values.manifest:
    _write('manifest', values.manifest, source.manifest())
  print(source.timing, file=sys.stderr)


def _generate(
  values: flags.FlagValues, source: 'generator.Generator', prompts: list[str], settings: params.SamplingParams
) -> 'list[Completion]':
  try:
    return source.generate(prompts, settings, batch_size=values.batch_size, progress=sys.stderr.isatty())
  except KeyboardInterrupt as error:
    raise errors.Stopped('interrupted; no text was written', signal.SIGINT) from error


def _generate_to(values: flags.FlagValues, source: 'generator.Generator', prompts: list[str], settings: params.SamplingParams) -> None:
  try:
    source.generate_to(values.output, prompts, settings, batch_size=values.batch_size, progress=sys.stderr.isatty())
  except KeyboardInterrupt as error:
    if not error.args:  # there is nothing to go on from: none was made, or all are written
      raise
    raise errors.Stopped(f'interrupted; {error}', signal.SIGINT) from error


def _write(field: str, path: str | None, lines: list[str]) -> None:
  if path:
    journal.write_new(field, path, lines)
  else:
    write_stream([''.join(lines)])


def _reproduce(values: flags.FlagValues) -> None:
  """Writes a manifest's texts again, as a manifest.

  Raises:
    UserError: it is damaged, or was written with another checkpoint.
    MachineFailed: a text is another one.
  """
  read = ('workdir', 'reproduce', 'output', 'draft', 'draft_tokens')
  _refuse_given(values, [name for name in values if name not in read], '--reproduce takes everything from the manifest')
  from textgen_jax.sampling import manifest

  wanted = manifest.read(values.reproduce)
  step = wanted.header['checkpoint']['step']
  if step is None:
    raise errors.UserError(f"reproduce={values.reproduce!r} names no step: Generator.reproduce writes a script's own model again")
  source = _load(values, str(step))
  lines = source.reproduce(wanted, progress=sys.stderr.isatty())
  _write('output', values.output, lines)
  print(source.timing, file=sys.stderr)
  differs = manifest.first_difference(wanted, lines)
  if differs:
    raise errors.MachineFailed(f'reproduce={values.reproduce!r}, line {differs}: this machine, or its versions, gives another text')
  same = 'every byte' if lines == wanted.lines else 'every text; the header tells of another machine'
  print(f'{values.reproduce}: the same, {same}', file=sys.stderr)


def _settings(values: flags.FlagValues) -> params.SamplingParams:
  taken = {field.name: getattr(values, field.name) for field in dataclasses.fields(params.SamplingParams)}
  for name in ('stop_tokens', 'banned_tokens'):
    taken[name] = tuple(_number(name, one, int) for one in taken[name])
  pairs = [one.partition(':') for one in taken['logit_bias']]
  taken['logit_bias'] = tuple((_number('logit_bias', i, int), _number('logit_bias', bias, float)) for i, _, bias in pairs)
  return params.SamplingParams(**{**taken, 'begins_document': False})  # the generator knows


def _number(name: str, text: str, kind: Any) -> Any:
  try:
    return kind(text)
  except ValueError as error:
    raise errors.UserError(f'{name}: {text!r} is not a number' + ('; write ID:NATS' if name == 'logit_bias' else '')) from error


def _tell_past_context(source: 'generator.Generator', reaches: int) -> None:
  context = source.model.context_length
  if reaches <= context:
    return
  if source.model.window is None:
    how = 'its state carries on'
  elif source.model.slides:
    how = 'the last part of the text is read anew whenever the context is full'
  else:
    how = f'attention sees the last {context}'
  print(f'the text may reach {reaches} tokens, and the model was trained on {context} at a time: {how}', file=sys.stderr)


def write_stream(pieces: Iterable[str]) -> None:
  """To stdout, piece by piece."""
  for piece in pieces:
    sys.stdout.write(piece.encode('utf-8', 'replace').decode('utf-8'))
    sys.stdout.flush()


if __name__ == '__main__':
  sys.exit(main(sys.argv))
