"""Ctrl-C and SIGTERM: at once where nothing is unsaved, else once the step is saved. Imports nothing slow."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Stop:
  """What a signal asks of a run: to leave, if nothing is unsaved; else `number` is set, which the run looks at after each step.

  A second signal leaves in any case.
  """

  def __init__(self, leave: Callable[[int, str, int], None]):
    self._leave, self._lock = leave, threading.RLock()
    self._saved: str | None = 'nothing was left unsaved'  # what to tell; None while a finished step is unsaved
    self._finish: Callable[[], None] | None = None
    self.number = 0

  def came(self, number: int) -> None:
    with self._lock:
      first, self.number = not self.number, number
      saved, finish = (self._saved, self._finish) if first else ('left at once; the last save holds', None)
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
    self._leave(number, told, code)

  def hold(self) -> None:
    """From here on there is something to save."""
    with self._lock:
      self._saved = self._finish = None

  def release(self, saved: str, finish: Callable[[], None] | None = None) -> None:
    """From here on a signal leaves at once, once `finish` has brought to disk what is on its way there."""
    with self._lock:
      self._saved, self._finish = saved, finish


_command: Stop | None = None


def watch() -> None:
  """For a command, before it imports anything slow: signals are answered while the main thread is deep in a compilation, too.

  Python runs a handler when the main thread comes back to the interpreter; a thread of our own reads of the signal right away.
  """
  global _command
  _command = Stop(_end_process)
  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  for number in NUMBERS:
    signal.signal(number, lambda number, frame: None)  # so that the number is written to the pipe
  signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
  threading.Thread(target=_answer, args=(reading, _command), name='signals', daemon=True).start()


def _answer(reading: int, stop: Stop) -> None:
  while numbers := os.read(reading, 1):
    if numbers[0] in NUMBERS:
      # A thread each: the first may be waiting for a save when the second comes.
      threading.Thread(target=stop.came, args=(numbers[0],), daemon=True).start()


def _end_process(number: int, told: str, code: int) -> None:
  del number
  # Not through sys.exit: the main thread may be minutes away from an exception.
  _say(f'error: {told}')
  with contextlib.suppress(Exception):
    sys.stdout.flush()
  os._exit(code)


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
