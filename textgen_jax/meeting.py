"""Why the processes of a run have not met, in words of ours: a port that is taken, a name that isn't known, a refusal."""

import contextlib
import errno
import os
import re
import socket
import threading

from textgen_jax import errors, launch_flags

LOOK_S = 5.0  # for a name and an answer, once the time to meet is up
DRAIN_S = 1.0  # for what stands in the pipe; the terminal behind it may be stopped
KEPT_BYTES = 1 << 16  # of what was heard
_FATAL = re.compile(rb'^F\d{4} \d\d:', re.MULTILINE)  # a line of absl's log after which the process aborts


def check_port(place: launch_flags.Place) -> None:
  """Raises MachineFailed where process 0 can't listen: JAX's library shares a port with its kind, and crashes where another has it."""
  if place.process_id != 0 or 'JAX_COORDINATOR_BIND_ADDRESS' in os.environ:
    return
  port = place.address()[1]
  for family, everywhere in ((socket.AF_INET6, '::'), (socket.AF_INET, '0.0.0.0')):
    try:
      with socket.socket(family) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was left a minute ago is free
        if family == socket.AF_INET6:
          listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.bind((everywhere, port))
      return
    except OSError as error:  # else there is no IPv6, say
      if error.errno in (errno.EADDRINUSE, errno.EACCES):
        why = 'is taken, by another run or another process 0' if error.errno == errno.EADDRINUSE else f'is not ours: {error.strerror}'
        raise errors.MachineFailed(f'{place.told("coordinator")}: port {port} {why}') from error


def why_late(place: launch_flags.Place, words: str) -> str:
  """What can be found out, in LOOK_S, once the time is up; `words`: what the library has said."""
  if 'from the same task' in words:  # the coordinator's, where a newcomer has taken another's place
    return 'two processes have come with the same --process_id, or one was started twice'
  found = [f"{place.coordinator} doesn't answer"]

  def look() -> None:
    try:
      socket.create_connection(place.address(), LOOK_S).close()
      found[0] = 'process 0 is there: another is missing, or they disagree on --num_processes or on who has which --process_id'
    except socket.gaierror as error:
      found[0] = f"the name {place.address()[0]!r} isn't known here ({error.strerror})"
    except OSError as error:
      found[0] = f'process 0 is not there ({error.strerror or error})'

  looking = threading.Thread(target=look, daemon=True)  # a name server has no limit of its own
  looking.start()
  looking.join(LOOK_S)
  return found[0]


def why_refused(place: launch_flags.Place, words: str) -> str | None:
  """What the coordinator's refusal means, with which the library aborts; None where it's something else."""
  if re.search('ALREADY_EXISTS|Aborted connect', words):
    return f'two processes of the run have the same {place.told("process_id")}'
  if 'Unexpected task' in words:
    ours = f'{place.told("process_id")} of {place.told("num_processes")}'
    return f'{ours} is not among those that process 0, at {place.coordinator}, expects: it has another --num_processes'
  return None


class Overheard:
  """stderr, read on its way: the library's words alone tell why it aborts. They are passed on, but for its last ones, which are held."""

  def __init__(self) -> None:
    self._words = self._held = b''
    self._real: int | None = None
    with contextlib.suppress(OSError):  # stderr may be closed
      real = os.dup(2)
      reading, writing = os.pipe()
      os.dup2(writing, 2)
      os.close(writing)
      self._reader = threading.Thread(target=self._pass_on, args=(reading, real), daemon=True)
      self._reader.start()
      self._real = real

  def _pass_on(self, reading: int, real: int) -> None:
    while heard := os.read(reading, KEPT_BYTES):
      self._words = (self._words + heard)[-KEPT_BYTES:]
      fatal = _FATAL.search(heard)
      at = 0 if self._held else fatal.start() if fatal else len(heard)
      self._held = (self._held + heard[at:])[:KEPT_BYTES]
      with contextlib.suppress(OSError):
        os.write(real, heard[:at])
    os.close(reading)

  def stop(self) -> str:
    """stderr is as it was; gives the words."""
    real, self._real = self._real, None
    if real is not None:
      os.dup2(real, 2)  # the pipe's end
      self._reader.join(DRAIN_S)
    return self._words.decode(errors='replace')

  def let_out(self) -> str:
    """As `stop`, and passes on what was held."""
    words = self.stop()
    held, self._held = self._held, b''
    with contextlib.suppress(OSError):
      os.write(2, held)
    return words
