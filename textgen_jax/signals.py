"""Ctrl-C and SIGTERM: at once where nothing is unsaved, else once the step is saved. Imports nothing slow."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM)
LAST_WORDS_S = 1.0  # to tell why a process ends, where nobody may be reading


class Stop:
  """What a signal asks of a run: if nothing is unsaved, it leaves by itself; else `number` is set, which the run looks at after each step.

  A second signal leaves in any case.
  """

  def __init__(self, leave: Callable[[int, str, int], None]):
    self._leave, self._lock = leave, threading.RLock()
    self._saved: str | None = 'nothing was left unsaved'  # what to tell; None while a finished step is unsaved
    self._finish: Callable[[], None] | None = None
    self._came = self._leaving = False
    self.number = 0

  def came(self, number: int) -> None:
    with self._lock:
      first, self._came = not self._came, True
      saved, finish = (self._saved, self._finish) if first else ('left at once; the last save holds', None)
      self._leaving = saved is not None
      if not self._leaving:
        self.number = number
    name = signal.Signals(number).name
    if saved is None:
      _say(f'{name}: stopping after this step; a second signal leaves at once')
      return
    told, code = f'{name}: {saved}', 128 + number
    try:
      if finish:
        finish()
    except Exception as error:  # the save failed: that is the worse news
      told, code = str(error), getattr(error, 'exit_code', 1)
    try:
      self._leave(number, told, code)
    finally:
      self._leaving = False

  def hold(self) -> None:
    """From here on there is something to save. Waits where a signal's thread is about to end the process: a step would be lost."""
    while True:
      with self._lock:
        if not self._leaving:
          self._saved = self._finish = None
          return
      time.sleep(0.01)

  def release(self, saved: str, finish: Callable[[], None] | None = None) -> None:
    """From here on a signal leaves at once, once `finish` has brought to disk what is on its way there."""
    with self._lock:
      self._saved, self._finish = saved, finish


_command: Stop | None = None
_farewells: list[Callable[[int, str], None]] = []
_before: dict[int, Any] = {}  # the handlers that `watch` has taken the place of


def watch() -> None:
  """For a command, before it imports anything slow: signals are answered while the main thread is deep in a compilation, too.

  Python runs a handler when the main thread comes back to the interpreter; a thread of our own reads of the signal right away.
  """
  global _command
  _command = Stop(_end_process)
  if sys.stderr is not None:
    sys.stderr = _Unheard(sys.stderr)
  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  for number in NUMBERS:
    _before[number] = signal.signal(number, lambda number, frame: None)  # so that the number is written to the pipe
  signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
  threading.Thread(target=_answer, args=(reading, _command), name='signals', daemon=True).start()


def unwatch() -> None:
  """For a command that has started, and has something to do when Ctrl-C comes: from here on it is a KeyboardInterrupt."""
  global _command
  if _command is not None:
    _command = None
    for number, handler in _before.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(-1)  # last: no signal falls between the two


class _Unheard:
  """stderr that may go away: a run outlives the terminal, the pipe or the disk that it was told to."""

  def __init__(self, stream: Any):
    self._stream = stream

  def write(self, text: str) -> int:
    with contextlib.suppress(OSError):
      self._stream.write(text)
    return len(text)

  def flush(self) -> None:
    with contextlib.suppress(OSError):
      self._stream.flush()

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


def _answer(reading: int, stop: Stop) -> None:
  while numbers := os.read(reading, 1):
    if numbers[0] in NUMBERS:
      # A thread each: the first may be waiting for a save when the second comes.
      threading.Thread(target=stop.came, args=(numbers[0],), daemon=True).start()


def before_leaving(function: Callable[[int, str], None]) -> None:
  """Has `function` called with the exit code and why, before a signal ends the process."""
  _farewells.append(function)


def _end_process(number: int, told: str, code: int) -> None:
  del number
  for farewell in _farewells:
    farewell(code, told)
  # The main thread may hold a stream's lock, in a write to a pipe that nobody reads.
  telling = threading.Thread(target=_last_words, args=(told,), daemon=True)
  telling.start()
  telling.join(LAST_WORDS_S)
  os._exit(code)  # not through sys.exit: the main thread may be minutes away from an exception


def _last_words(told: str) -> None:
  _say(f'error: {told}')
  with contextlib.suppress(Exception):
    sys.stdout.flush()


def _say(text: str) -> None:
  with contextlib.suppress(OSError, ValueError, AttributeError):  # a run outlives the terminal that watched it
    sys.stderr.write(f'\n{text}\n' if sys.stderr.isatty() else f'{text}\n')  # a bar may stand on the line
    sys.stderr.flush()


@contextlib.contextmanager
def caught() -> Iterator[Stop]:
  """The process's own Stop where `watch` has made one; else one whose handlers hold within, and that leaves as without it."""
  if _command is not None:
    yield _command
    return
  previous: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

  def leave(number: int, told: str, code: int) -> None:
    del told, code
    signal.signal(number, previous[number])
    signal.raise_signal(number)

  stop = Stop(leave)
  try:
    for number in NUMBERS:
      previous[number] = signal.signal(number, lambda number, frame: stop.came(number))
  except ValueError:  # not the main thread: whoever owns that one handles signals
    pass
  try:
    yield stop
  finally:
    for caught_number, handler in previous.items():
      signal.signal(caught_number, handler)
