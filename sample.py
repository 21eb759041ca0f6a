"""Writes text with a trained model.

  python sample.py --workdir=runs/shakespeare --prompt='ROMEO:' --temperature=0.8 --num_samples=3

Results go to stdout (or --output), diagnostics to stderr. Equal flags give equal text.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags

from textgen_jax import command_line, compilation, errors
from textgen_jax.sampling import params
from textgen_jax.text import base

MAX_PROMPTS_BYTES = 1 << 30


def main(argv: Sequence[str]) -> int:
  return command_line.run(_main, argv)


def _define_flags() -> flags.FlagValues:
  values = flags.FlagValues()
  command_line.define_model_flags(values)
  text = {
    'prompts_file': (None, 'prompts from a file: .txt, a line each, or .jsonl, {"prompt": ...} each'),
    'format': ('text', 'text (prompt and continuation, results set apart by ---) or jsonl'),
    'output': (None, 'a file to write to instead of stdout'),
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
  switches = {
    'begins_document': (None, 'the prompt begins a document; not given: if the model was trained on documents apart'),
    'stream': (False, 'show one text as it is made'),
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
  settings = _settings(values)
  if values.prompt and values.prompts_file:
    raise errors.UserError('--prompt and --prompts_file: give one of them')
  prompts = read_prompts(pathlib.Path(values.prompts_file)) if values.prompts_file else values.prompt or ['']
  if values.stream and (len(prompts) > 1 or settings.num_samples > 1 or values.format != 'text' or values.output):
    raise errors.UserError('--stream shows one sample of one prompt as text: drop the other prompts, num_samples, format or output')
  if values.output and not pathlib.Path(values.output).absolute().parent.is_dir():
    raise errors.UserError(f'output={values.output!r}: its directory does not exist')
  if values.output and pathlib.Path(values.output).is_dir():
    raise errors.UserError(f'output={values.output!r} is a directory')
  if values.output and pathlib.Path(values.output).exists():
    raise errors.UserError(f'output={values.output!r} exists: name a new file')
  from textgen_jax import workdir  # after the checks: it takes seconds to import
  from textgen_jax.sampling import batch, generate

  compilation.keep_compiled()
  trained = workdir.load(values.workdir, values.checkpoint)
  if values.begins_document is None:
    settings = dataclasses.replace(settings, begins_document=trained.experiment.training.mask_documents)
  reaches = max(len(batch.prompt_ids(trained.tokenizer, prompt)) for prompt in prompts) + settings.max_new_tokens
  if reaches > trained.model.context_length:
    _tell_past_context(trained, reaches)
  if values.stream:
    write_stream([prompts[0]])
    write_stream(generate.stream(trained.model, trained.params, trained.tokenizer, prompts[0], settings))
    write_stream(['\n'])
    return
  completions = generate.generate(trained.model, trained.params, trained.tokenizer, prompts, settings)
  if values.format == 'jsonl':
    text = ''.join(json.dumps(c.row(), ensure_ascii=False) + '\n' for c in completions)
  else:
    text = '---\n'.join(f'{c.prompt}{c.text}\n' for c in completions)
  if values.output:
    try:
      pathlib.Path(values.output).write_text(text, encoding='utf-8', errors='replace')
    except OSError as error:
      raise errors.MachineFailed(f'output={values.output!r} could not be written: {error.strerror}') from error
  else:
    write_stream([text])


def _settings(values: flags.FlagValues) -> params.SamplingParams:
  taken = {field.name: getattr(values, field.name) for field in dataclasses.fields(params.SamplingParams)}
  for name in ('stop_tokens', 'banned_tokens'):
    taken[name] = tuple(_number(name, one, int) for one in taken[name])
  pairs = [one.partition(':') for one in taken['logit_bias']]
  taken['logit_bias'] = tuple((_number('logit_bias', i, int), _number('logit_bias', bias, float)) for i, _, bias in pairs)
  return params.SamplingParams(**{**taken, 'begins_document': bool(values.begins_document)})


def _number(name: str, text: str, kind: Any) -> Any:
  try:
    return kind(text)
  except ValueError as error:
    raise errors.UserError(f'{name}: {text!r} is not a number' + ('; write ID:NATS' if name == 'logit_bias' else '')) from error


def _tell_past_context(trained, reaches: int) -> None:  # type: ignore[no-untyped-def]
  context = trained.model.context_length
  if trained.model.window is None:
    how = 'its state carries on'
  elif trained.model.slides:
    how = 'the last part of the text is read anew whenever the context is full'
  else:
    how = f'attention sees the last {context}'
  print(f'the text may reach {reaches} tokens, and the model was trained on {context} at a time: {how}', file=sys.stderr)


def write_stream(pieces: Iterable[str]) -> None:
  """To stdout, piece by piece."""
  for piece in pieces:
    sys.stdout.write(piece.encode('utf-8', 'replace').decode('utf-8'))
    sys.stdout.flush()


def read_prompts(path: pathlib.Path) -> list[str]:
  """Prompts of a .txt or .jsonl file, in order.

  Raises:
    UserError: names the file, the line and what it lacks.
  """
  try:
    text = base.read_bounded(path, MAX_PROMPTS_BYTES, 'prompts_file').decode('utf-8-sig')
    lines = text.replace('\r\n', '\n').removesuffix('\n').split('\n')
  except UnicodeDecodeError as error:
    raise errors.UserError(f"prompts_file={str(path)!r} isn't UTF-8 at byte {error.start}") from error
  if lines == ['']:
    raise errors.UserError(f'prompts_file={str(path)!r} holds no prompt')
  if path.suffix != '.jsonl':
    prompts = lines
  else:
    prompts = []
    for number, line in enumerate(lines, start=1):
      try:
        prompt = json.loads(line)['prompt']
      except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise errors.UserError(f'prompts_file={str(path)!r}, line {number}: not {{"prompt": ...}}') from error
      if not isinstance(prompt, str):
        raise errors.UserError(f'prompts_file={str(path)!r}, line {number}: prompt={prompt!r} is not a string')
      prompts.append(prompt)
  return prompts


if __name__ == '__main__':
  sys.exit(main(sys.argv))
