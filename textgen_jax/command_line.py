"""Flags in, an experiment out; every user's mistake as one line and an exit code."""

import contextlib
import copy
import dataclasses
import difflib
import errno
import gc
import inspect
import os
import pathlib
import re
import sys
import typing
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from textgen_jax import errors

if TYPE_CHECKING:  # an experiment imports JAX, 0.6 s: it is imported where it is used, so that help and a wrong flag don't wait for it
  from textgen_jax import experiment as experiment_lib

MAX_LINE = 300  # characters of what is told of a mistake
# A path that can't be one: the user's mistake, not the machine's.
NAMES_NOTHING = (errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
# Objects between two collections. Imports and traces make a million that stay: at Python's own 700, 0.3 s of a start's 2.8 went there.
GC_THRESHOLD = 10_000
# How the processes of a run find each other: the fields of launch_flags.Launch.
LAUNCH_FLAGS = {
  'coordinator': 'HOST:PORT of process 0, where a run has several processes and no launcher tells',
  'num_processes': 'how many the run has',
  'process_id': 'which this one is, from 0',
  'join_timeout_s': 'seconds for all processes to come, 300 unless given; then exit code 5',
  'hang_timeout_s': 'seconds without a finished step, evaluation batch or save, 900 unless given; then exit code 5',
}


def run(
  main: Callable[[Sequence[str]], None],
  argv: Sequence[str],
  smaller: str = 'a smaller model.dim, training.batch_size or training.sequence_length takes less',
) -> int:
  """Calls `main(argv)` and gives the exit code; a RunError becomes one line on stderr, which tells what is `smaller` where memory ends."""
  gc.set_threshold(GC_THRESHOLD, *gc.get_threshold()[1:])
  logging.set_verbosity(logging.ERROR)  # orbax tells at length what it does
  warnings.filterwarnings('ignore', 'Possible (nested set|set )', FutureWarning)  # of a user's regular expression, with our source lines
  for name in ('stdout', 'stderr'):
    if getattr(sys, name) is None:  # closed by the caller, `>&-`: what would go there goes nowhere, and not to the other one
      setattr(sys, name, open(os.devnull, 'w', encoding='utf-8'))  # noqa: SIM115
  try:
    main(argv)
    sys.stdout.flush()
  except BrokenPipeError:  # a reader that has had enough, as `head` has
    pass
  except errors.RunError as error:
    return _end(str(error), error.exit_code)
  except KeyboardInterrupt:
    return _end('interrupted; nothing was left unsaved', 130)
  except OSError as error:
    code = errors.UserError.exit_code if error.errno in NAMES_NOTHING else errors.MachineFailed.exit_code
    return _end(f'{error.filename or "a file"}: {error.strerror or error}', code)
  except (MemoryError, RuntimeError) as error:
    if not errors.is_out_of_memory(error):
      raise
    first = (str(error).splitlines() or ['MemoryError'])[0][:200]
    return _end(f'out of memory: {first}; {smaller}', errors.MachineFailed.exit_code)
  finally:
    _let_go_of_the_unwritten()
  return 0


def _end(message: str, code: int) -> int:
  """Tells why a command ends; the code, even where nothing can be told any more."""
  with contextlib.suppress(OSError):
    print(one_line(f'error: {message}'), file=sys.stderr, flush=True)
  return code


def _let_go_of_the_unwritten() -> None:
  """What can't be written goes nowhere: the interpreter would flush it once more at its end, fail, and give a code of its own."""
  for stream in (sys.stdout, sys.stderr):
    try:
      stream.flush()
    except OSError:
      os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def one_line(message: str) -> str:
  """A message in at most MAX_LINE characters that any terminal can show, without secrets.

  What is too long loses its middle: at first the longest words, which are values and paths, so that a field's name before
  them and the constraint behind stay.
  """
  line = ' '.join(errors.without_secrets(_shortened(message, 16 * MAX_LINE)).split())
  line = ''.join(one if one.isprintable() else one.encode('unicode_escape').decode('ascii') for one in line)
  for most in (MAX_LINE // 2, MAX_LINE // 4, MAX_LINE // 8):
    if len(line) > MAX_LINE:
      line = re.sub(rf'\S{{{most + 1},}}', lambda match, most=most: _shortened(match[0], most), line)  # type: ignore[misc]
  return _shortened(line, MAX_LINE)


def _shortened(text: str, most: int) -> str:
  if len(text) <= most:
    return text
  half = (most - 1) // 2
  return f'{text[: most - 1 - half]}…{text[len(text) - half :]}'


def parse_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
  """Parses all of argv, or raises UserError with the nearest flag's name."""
  for arg in argv[1:]:
    if arg.startswith('-') and (name := _flag_name(arg)) in ('flagfile', 'undefok'):  # absl's own: it would read any file, a device too
      raise _unknown_flag(name, values)
  try:
    # Unknown ones come back: absl looks for what is near them for as long as it takes, and deeper than Python allows.
    rest = values(list(argv), known_only=True)
  except (flags.Error, ValueError) as error:  # ValueError: --noNAME=value
    raise errors.UserError(str(error)) from error
  if len(rest) > 1:
    if rest[1].strip('-') and rest[1].startswith('-'):
      raise _unknown_flag(_flag_name(rest[1]), values)
    raise errors.UserError(f'{rest[1]!r} is not a flag: flags are written --name=value')


def _flag_name(arg: str) -> str:
  return arg.lstrip('-').partition('=')[0]


def _unknown_flag(name: str, values: flags.FlagValues) -> errors.UserError:
  near = difflib.get_close_matches(name[:100], list(values), 1)
  return errors.UserError(f'there is no flag --{name}' + (f'; did you mean --{near[0]}?' if near else ''))


def wants_help(argv: Sequence[str]) -> bool:
  return any(arg in ('--help', '-h', '-help', '--helpfull', '--helpshort') for arg in argv[1:])


def define_model_flags(values: flags.FlagValues) -> None:
  """`--workdir` and `--checkpoint`, for a command that works with a trained model."""
  flags.DEFINE_string('workdir', None, 'where the model was trained', flag_values=values)
  flags.DEFINE_string('checkpoint', 'best', 'best (by val loss), latest, or a step', flag_values=values)


def parsed(values: flags.FlagValues, argv: Sequence[str], about: str | None) -> bool:
  """Parses all of argv, or raises UserError; False where help was asked for, and is shown with what the command is `about`."""
  if wants_help(argv):
    own = [flag for name, members in values.flags_by_module_dict().items() if name != 'absl.flags' for flag in members]
    print(about)
    for flag in own:
      default = '...' if flag.default in (None, [], '') else flag.default
      print(f'  --{flag.name}={default}: {flag.help.splitlines()[0].rstrip(";")}')  # absl adds lines that say what ours say
    return False
  parse_flags(values, argv)
  return True


def need_workdir(values: flags.FlagValues) -> None:
  if not values.workdir:
    raise errors.UserError('--workdir is missing: name the directory that train.py wrote to')


def named_config(argv: Sequence[str]) -> str | None:
  """The config file that argv names, as `--config=FILE` or `--config FILE`."""
  for i, arg in enumerate(argv):
    if arg.startswith('--config='):
      return arg.partition('=')[2]
    if arg == '--config' and i + 1 < len(argv):
      return argv[i + 1]
  return None


def parse_training(argv: Sequence[str]) -> tuple['experiment_lib.Experiment', str, dict[str, Any]]:
  """As `parse_experiment`, and the flags of `launch_flags.Launch` that were given."""
  values = flags.FlagValues()
  for name, meaning in LAUNCH_FLAGS.items():
    define = flags.DEFINE_string if name == 'coordinator' else flags.DEFINE_integer
    define(name, None, meaning, flag_values=values)
  experiment, workdir = parse_experiment(argv, values)
  return experiment, workdir, {name: values[name].value for name in LAUNCH_FLAGS if values[name].value is not None}


def parse_experiment(argv: Sequence[str], values: flags.FlagValues | None = None) -> tuple['experiment_lib.Experiment', str]:
  """The experiment and the workdir that `--config`, `--config.field` and `--workdir` describe.

  Args:
    argv: the command.
    values: what else it may give.

  Raises:
    UserError: names the flag or field, with the nearest that there is.
  """
  values = flags.FlagValues() if values is None else values
  given = overrides(argv)
  others = [arg for arg in argv if arg not in given]
  flags.DEFINE_string('config', None, 'a file of configs/', flag_values=values)
  flags.DEFINE_string('workdir', None, 'where the run lives', flag_values=values)
  parse_flags(values, others)
  if values.config and not values.workdir:
    raise errors.UserError('--workdir is missing: name a directory for the run, such as --workdir=runs/shakespeare')
  return experiment_of(values.config, given), values.workdir


def overrides(argv: Sequence[str]) -> list[str]:
  """What of argv sets fields of a configuration: `--config.FIELD=VALUE`."""
  return [arg for arg in argv[1:] if arg.lstrip('-').startswith('config.')]


def experiment_of(path: str | None, given: Sequence[str]) -> 'experiment_lib.Experiment':
  """The experiment of a config file with fields set by `overrides`; UserError as of `parse_experiment`."""
  if not path:
    raise errors.UserError('--config is missing: name a file, such as --config=configs/shakespeare_char.py')
  base = load_config(path)
  for override in given:
    _check_override(base, override)
  return _apply(path, given)


def load_config(path: str) -> 'experiment_lib.Experiment':
  """What a config file's `get_config()` gives."""
  if not pathlib.Path(path).is_file():
    near = difflib.get_close_matches(path, [str(p) for p in pathlib.Path(path).parent.glob('*.py')], 1)
    raise errors.UserError(f'--config={path!r} is not a file' + (f'; did you mean {near[0]}?' if near else ''))
  return _apply(path, [])


def _apply(path: str, overrides: Sequence[str]) -> 'experiment_lib.Experiment':
  from ml_collections import config_flags

  from textgen_jax import experiment as experiment_lib

  values = flags.FlagValues()
  sys.modules.pop('config_config', None)  # the loader would add this file's names to those of the last one
  argv = ['train.py', f'--config={path}', *overrides]
  config_flags.DEFINE_config_file('config', None, 'a config file', flag_values=values, sys_argv=argv)
  try:
    parse_flags(values, argv)
    experiment = copy.deepcopy(values.config)
    is_experiment = isinstance(experiment, experiment_lib.Experiment)
  except errors.RunError:
    raise
  except Exception as error:  # the file is the user's own code, and may raise anything
    cause = str(error).strip().splitlines()[-1:] or [type(error).__name__]
    raise errors.UserError(f'--config={path!r} gives no experiment: {cause[0].strip()}') from error
  if not is_experiment:
    raise errors.UserError(f'--config={path!r}: get_config() gives a {type(experiment).__name__}, not an Experiment')
  return experiment


def _check_override(config: Any, override: str) -> None:
  """Raises UserError where `--config.a.b=value` names no field of the tree."""
  from textgen_jax import experiment as experiment_lib

  path = override.lstrip('-').partition('=')[0].removeprefix('config.')
  prefix = ''
  for name in path.split('.'):
    names = [field.name for field in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else []
    if name not in names:
      if not names:
        raise errors.UserError(f'there is no field {path}: {prefix.rstrip(".")} has no fields')
      if path == 'model.kind':
        raise errors.UserError('model.kind is set by the config file, which builds the model: a flag cannot change it')
      raise errors.UserError(experiment_lib.unknown_field(prefix + name, prefix, name, names))
    prefix, config = f'{prefix}{name}.', getattr(config, name)
  if isinstance(config, dict):
    raise errors.UserError(f'{path} is a table, which a config file can set and a flag cannot')
  if dataclasses.is_dataclass(config):
    members = ', '.join(prefix + field.name for field in dataclasses.fields(config))
    raise errors.UserError(f'{path} is a group of fields: set one of {members}')


def field_comments(cls: type) -> dict[str, str]:
  """What the comments beside a dataclass's fields say: a field is explained in one place."""
  return dict(re.findall(r'^  (\w+): .*?  # (.*)$', inspect.getsource(cls), re.MULTILINE))


def launch_help() -> str:
  """The flags of `launch_flags.Launch`."""
  lines = [f'  --{name}=...: {meaning}\n' for name, meaning in LAUNCH_FLAGS.items()]
  return 'Flags where a run has several processes:\n' + ''.join(lines)


def experiment_help(argv: Sequence[str]) -> str:
  """The fields of the config file that argv names, or with their defaults."""
  if path := named_config(argv):
    return f'The fields of {path}:\n{config_help(load_config(path))}'
  from textgen_jax import experiment as experiment_lib

  return f'The fields, with their defaults:\n{config_help(experiment_lib.Experiment())}'


def config_help(config: 'experiment_lib.Experiment') -> str:
  """The whole tree, a line a field: how to set it, its value, its type and what it means."""
  from textgen_jax import experiment as experiment_lib
  from textgen_jax.models import build

  lines = []

  def walk(node: Any, prefix: str) -> None:
    hints = typing.get_type_hints(type(node))
    comments = field_comments(type(node))
    for field in dataclasses.fields(node):
      value = getattr(node, field.name)
      if dataclasses.is_dataclass(value):
        kind = next((f' ({kind})' for kind, cls in build.CONFIGS.items() if isinstance(value, cls)), '')
        lines.append(f'\n{prefix}{field.name}{kind}')
        walk(value, f'{prefix}{field.name}.')
      else:
        meaning = f': {comments[field.name]}' if field.name in comments else ''
        lines.append(f'  --config.{prefix}{field.name}={value!r} ({experiment_lib.type_name(hints[field.name])}){meaning}')

  walk(config, '')
  return '\n'.join(lines)
