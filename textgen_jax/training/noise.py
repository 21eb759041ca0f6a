"""What orbax, tensorstore and asyncio tell at length of a save that failed, kept off the screen: it is raised too, as one error."""

import logging
import sys
import threading
import time
import traceback
from typing import Any

_others = sys.unraisablehook


def hush() -> None:
  """For the whole process; may be called again."""
  global _others
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).addFilter(_is_news)
  if sys.unraisablehook is not _unraisable:
    _others, sys.unraisablehook = sys.unraisablehook, _unraisable


def wait_for_stragglers(seconds: float) -> None:
  """Orbax gives up with the first of its threads that fails, while others still write."""
  deadline = time.monotonic() + seconds
  for thread in threading.enumerate():
    if type(thread).__module__.startswith('orbax.') and thread is not threading.current_thread():
      threading.Thread.join(thread, max(0.0, deadline - time.monotonic()))  # orbax's own raises what the thread did


def _is_news(record: logging.LogRecord) -> bool:
  if record.levelno < logging.ERROR or not record.exc_info:
    return True
  return 'orbax' not in record.getMessage() + ''.join(traceback.format_exception(*record.exc_info))


def _unraisable(found: Any) -> None:
  # Tensorstore calls back into the event loop of the thread that has failed.
  if not (isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == 'Event loop is closed'):
    _others(found)
