"""A conversation with a model, a line at a time: prompts, empty lines that go on, and commands that change the settings."""

import contextlib
import dataclasses
import difflib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from textgen_jax import command_line, errors
from textgen_jax.sampling import params
from textgen_jax.sampling.params import SamplingParams

MAX_LINE = params.MAX_PROMPT_CHARACTERS + 3  # characters: its end is two, and one is too much
UNREAD = ('num_samples', 'best_of', 'num_beams', 'length_penalty', 'log_probs', 'alternatives')  # one text is written, as text
FIXED = ('begins_document',)  # the generator may insist on it, and a setting of the conversation would change nothing
FIELDS: dict[str, Any] = {
  field.name: field.type
  for field in dataclasses.fields(SamplingParams)
  if field.type in (int, float, str, bool) and field.name not in (*UNREAD, *FIXED)
}
COMMANDS = {
  'show': 'the settings that differ from their defaults',
  'again': 'another text from where the last one began: the next seed',
  'new': 'lets go of the text: an empty line begins a document',
  'help': 'this list',
  'quit': 'the end, as Ctrl-D is',
}
ABOUT = (
  'A line is what a text begins with (// for /), an empty line goes on where the text stands, Ctrl-C stops it;'
  ' /temperature 0.5 sets, /help lists what there is.'
)
_SWITCH = {'true': True, 'on': True, 'yes': True, '1': True, 'false': False, 'off': False, 'no': False, '0': False}


class Streams(Protocol):
  """What is asked of a `generator.Generator`."""

  def stream(self, prompt: str, settings: SamplingParams) -> Iterator[str]: ...


def _tell(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


class Session:
  """Answers lines.

  Args:
    generator: makes the texts.
    settings: of the first text.
    write: takes the texts, piece by piece.
    tell: takes everything else, a line or several at a time.

  Attributes:
    settings: of the next text.
    text: where it stands: the last prompt and all that was made since.
  """

  def __init__(self, generator: Streams, settings: SamplingParams, write: Callable[[str], None], tell: Callable[[str], None] = _tell):
    self._generator, self._write, self._tell = generator, write, tell
    self.settings, self.text = settings, ''
    # What the last text was made from, and whether that stands at a document's start, as an empty prompt does.
    self._last: tuple[str, bool] = ('', True)

  def answer(self, line: str) -> bool:
    """Does what the line asks for; False where it ends the session."""
    if line.startswith('/') and not line.startswith('//'):
      try:
        name, value = [*line[1:].split(maxsplit=1), '', ''][:2]
        return self._command(name, value.strip())
      except errors.UserError as error:
        self._tell(command_line.one_line(f'error: {error}'))
    elif line:
      prompt = line[1:] if line.startswith('//') else line
      self._stream(prompt, prompt, False)
    else:
      # Half a character that a text was cut at: it can't be gone on from.
      self._stream(self.text.rstrip('\ufffd'), '', self._last[1])
    return True

  def _stream(self, prompt: str, shown: str, from_start: bool) -> None:
    """One text, after `shown`. An error leaves everything as it was; Ctrl-C leaves what was made so far."""
    settings = dataclasses.replace(self.settings, begins_document=True) if from_start else self.settings
    made = ''
    try:
      for piece in self._generator.stream(prompt, settings):
        made += piece
        self._write(shown + piece)  # together: what the settings ask for may be refused before the first piece
        shown = ''
    except errors.UserError as error:
      self._tell(command_line.one_line(f'error: {error}'))
      return
    except (MemoryError, RuntimeError) as error:
      if not errors.is_out_of_memory(error):
        raise
      self._tell('error: out of memory: a smaller max_new_tokens takes less')
      return
    except KeyboardInterrupt:
      self._tell('\nstopped: an empty line goes on from here')
    self._write(shown + '\n')
    self.text, self._last = prompt + made, (prompt, from_start)

  def _command(self, name: str, value: str) -> bool:
    if name == 'quit':
      return False
    if name == 'show':
      self._tell('\n'.join(self._changed()) or 'every setting has its default')
    elif name == 'help':
      self._tell(_help())
    elif name == 'again':
      self._again()
    elif name == 'new':
      self.text, self._last = '', ('', True)
    elif name in FIELDS:
      self.settings = dataclasses.replace(self.settings, **{name: _value(name, value)})
      self._tell(f'{name} = {getattr(self.settings, name)!r}')
    else:
      near = difflib.get_close_matches(name, [*COMMANDS, *FIELDS], 1)
      raise errors.UserError(f'there is no /{name:.60}' + (f'; did you mean /{near[0]}?' if near else '; /help lists what there is'))
    return True

  def _again(self) -> None:
    self.settings = dataclasses.replace(self.settings, seed=(self.settings.seed + 1) % 2**32)
    self._tell(f'seed = {self.settings.seed}')
    prompt, from_start = self._last
    self._stream(prompt, prompt, from_start)

  def _changed(self) -> list[str]:
    defaults = SamplingParams()
    names = [field.name for field in dataclasses.fields(defaults) if getattr(self.settings, field.name) != getattr(defaults, field.name)]
    return [f'{name} = {getattr(self.settings, name)!r}' for name in names]


def _value(name: str, text: str) -> Any:
  """A field's value as it is written; nothing: its default."""
  kind = FIELDS[name]
  if not text:
    return getattr(SamplingParams(), name)
  if kind is bool:
    if text.lower() not in _SWITCH:
      raise errors.UserError(f'{name}={text!r:.60} is neither true nor false')
    return _SWITCH[text.lower()]
  try:
    return kind(text)
  except ValueError as error:
    raise errors.UserError(f'{name}={text!r:.60} is not a {"whole number" if kind is int else "number"}') from error


def _help() -> str:
  comments = command_line.field_comments(SamplingParams)
  commands = [f'  /{name}: {what}' for name, what in COMMANDS.items()]
  fields = [f'  /{name} {getattr(SamplingParams(), name)!r}: {comments[name]}' for name in FIELDS]
  return '\n'.join([ABOUT, *commands, 'Settings, here with their defaults, which a name alone brings back:', *fields])


def run(generator: Streams, settings: SamplingParams, lines: Iterable[str], write: Callable[[str], None]) -> None:
  """Answers lines until they end, or one of them ends the session."""
  session = Session(generator, settings, write)
  for line in lines:
    if not session.answer(line):
      break


def read_lines() -> Iterator[str]:
  """Lines of stdin, with an editor and a history on a terminal. Bytes that aren't UTF-8 become half surrogate pairs."""
  if sys.stdin is None:  # closed by the caller: `<&-`
    return
  sys.stdin.reconfigure(errors='surrogateescape')  # type: ignore[union-attr]
  if not (sys.stdin.isatty() and sys.stdout.isatty()):
    # What is longer than any prompt may be is cut, so that an endless line fills no memory, and refused as a prompt.
    while line := sys.stdin.readline(MAX_LINE):
      rest = line
      while len(rest) == MAX_LINE and not rest.endswith('\n'):
        rest = sys.stdin.readline(MAX_LINE)
      yield line.rstrip('\r\n')
    return
  with contextlib.suppress(ImportError):
    importlib.import_module('readline')  # `input` uses it once it is there
  _tell(ABOUT)
  while True:
    try:
      line = input('> ')
    except EOFError:
      _tell('')
      return
    yield line
