"""Ctrl-C and SIGTERM as a request that the loop looks at."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def caught(say: Callable[[str], None]) -> Iterator[list[int]]:
  """A list that SIGINT and SIGTERM add themselves to; a second one acts at once."""
  numbers: list[int] = []

  def catch(number: int, frame: Any) -> None:
    del frame
    if numbers:
      signal.signal(number, signal.SIG_DFL)
      signal.raise_signal(number)
    numbers.append(number)
    say(f'{signal.Signals(number).name}: stopping after this step; a second signal leaves at once')

  try:
    previous = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
  except ValueError:  # not the main thread: whoever owns that one handles signals
    previous = {}
  try:
    yield numbers
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
