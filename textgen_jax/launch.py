"""Several processes as one run: how they find each other, and how they end together."""

import contextlib
import ctypes
import faulthandler
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import jax

from textgen_jax import errors, launch_flags, meeting, processes

FAILED = errors.MachineFailed.exit_code  # of a process whose peer is lost
ALIKE = (errors.UserError, errors.NoGoodCheckpoint, errors.Diverged)  # what all processes raise, if one does
HEARTBEAT_S = 30  # without a sign of life from a process, after which JAX ends the others
# What collectives say, on CPU by Gloo and on GPU by NCCL, when one of their processes is gone.
_PEER_LOST = re.compile(r'(?i)gloo|nccl|connection (closed|reset)|broken pipe|UNAVAILABLE|coordination|heartbeat|barrier|DEADLINE_EXCEEDED')
GRACE_S = 1.5  # for a process to come to its own end, once another has told of the run's
LEADER_S = 2.5  # that the coordinator's process stays at most, so that the others end by themselves and not for want of it
LISTEN_MS = 3_600_000  # one question after another's end
CALL_S = 1.0  # for the last words to the coordinator, which may be gone

_joined = False  # by `join`: this process ends with the others
_leaving: int | None = None  # the exit code, once the others are told
# While it joins:
_heard: meeting.Overheard | None = None
_place: launch_flags.Place | None = None


def join(launch: launch_flags.Launch) -> None:
  """Meets the other processes, where there are any; before JAX looks for devices.

  From here on this process ends, by `os._exit`, with any other of the run: with exit code 5 where one is lost, and tells where it stood.

  Raises:
    UserError: the launcher's environment doesn't do.
    MachineFailed: the coordinator's port is taken.
  """
  global _heard, _place, _joined
  if not launch.several:
    return
  # JAX's own would take SIGTERM, and nobody would hear of it.
  jax.config.update('jax_enable_preemption_service', False)
  late = threading.Timer(launch.join_timeout_s, _late, [launch.join_timeout_s])
  late.daemon = True
  late.start()
  try:
    _place = launch.place()
    meeting.check_port(_place)
    _heard = meeting.Overheard()
    _catch_aborts()
    jax.distributed.initialize(
      _place.coordinator,
      _place.num_processes,
      _place.process_id,
      # A launcher would give each process one GPU, whatever the flags say.
      cluster_detection_method='deactivate' if _place.by_hand else None,
      initialization_timeout=launch.join_timeout_s + 60,  # ours comes first
      heartbeat_timeout_seconds=HEARTBEAT_S,
    )
    processes.meet()
  except (ValueError, KeyError) as error:
    if _place is None or not _place.by_hand:
      raise launch_flags.untold(error) from error
    raise errors.UserError(f'the processes of the run did not meet: {error}') from error
  except RuntimeError as error:  # a port that is taken by now, a launcher that doesn't answer: another try may do
    where = f' at {_place.told("coordinator")}, whose port may be taken' if _place else ''
    raise errors.MachineFailed(f'the processes of the run did not meet{where}: {error}') from error
  finally:
    late.cancel()
    if _heard:
      _heard.let_out()
  _joined = True
  for target in (_listen, lambda: _watch(launch.hang_timeout_s)):
    threading.Thread(target=target, daemon=True).start()


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Within it what ends this process ends all that have joined, and at once: to unwind would be to wait for the others' part in a save.

  What all processes raise alike (UserError, NoGoodCheckpoint, Diverged) is left to unwind, as it would in a process alone.
  """
  try:
    yield
  except ALIKE:
    raise
  except errors.RunError as error:
    _leave_with(error)
    raise
  except BaseException as error:
    if _joined:
      traceback.print_exc()
      if _PEER_LOST.search(str(error)):
        time.sleep(GRACE_S + 1)  # a peer that has told of its end ends us; of one that could not we have but this error
        _lost(f'another process of the run is lost: {(str(error).splitlines() or [""])[0]}')
      leave(FAILED if isinstance(error, OSError) else 1, f'{type(error).__name__}: {error}')
    raise
  finally:
    processes.rest()


@contextlib.contextmanager
def alike(let_go: Callable[[], None]) -> Iterator[None]:
  """Within it a RunError of one process ends all that have joined, after `let_go`: they go on together, or not at all."""
  try:
    yield
  except errors.RunError as error:
    if _joined:
      let_go()
    _leave_with(error)
    raise
  processes.meet()


def _leave_with(error: errors.RunError) -> None:
  if _joined:
    _say(f'error: {error}')
    leave(error.exit_code, str(error))


def leave(code: int, told: str) -> None:
  """Ends this process, at once and for good, after telling the others what it ends with. Where none have joined, it returns.

  Interpreters that end in the usual way wait for each other, minutes long where one is gone.
  """
  if not _joined:
    return
  if code == 0:
    processes.meet()  # none has done its part while another could still fail
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError, AttributeError):
      stream.flush()
  announce(code, told)
  os._exit(code)


def announce(code: int, told: str) -> None:
  """Tells the others that this process ends; the leader waits for them a little, for the coordinator ends with it."""
  global _leaving
  if _heard:
    _heard.let_out()  # what is told from here on
  if not _joined:
    return
  _leaving = code

  def tell() -> None:
    with contextlib.suppress(RuntimeError):  # the coordinator may be gone, and another may have been the first
      if code:
        processes.client().key_value_set('end', json.dumps([processes.index(), code, told]), allow_overwrite=False)
    with contextlib.suppress(RuntimeError):
      processes.client().key_value_set(f'gone/{processes.index()}', '')

  telling = threading.Thread(target=tell, daemon=True)
  telling.start()
  telling.join(CALL_S)
  until = time.monotonic() + LEADER_S
  with contextlib.suppress(RuntimeError):
    while processes.is_leader() and time.monotonic() < until and len(processes.client().key_value_dir_get('gone/')) < processes.count():
      time.sleep(0.05)


def _listen() -> None:
  """Ends this process when another has told of its own end."""
  while True:
    try:
      i, code, told = json.loads(processes.client().blocking_key_value_get('end', LISTEN_MS))
      break
    except RuntimeError:  # not yet; or the coordinator is gone, and JAX ends the process
      time.sleep(1)
  if i != processes.index():
    time.sleep(GRACE_S)
    orderly = code > 128 or code in (kind.exit_code for kind in processes.KINDS)
    words = f'process {i} of {processes.count()} has ended: {told}'
    if orderly:
      _say(f'error: {words}')
      leave(code, words)
    _lost(words)


def _watch(limit_s: float) -> None:
  while True:
    time.sleep(min(0.5, limit_s / 4))
    if (last := processes.last_beat()) is not None and time.monotonic() - last > limit_s:
      _lost(f'nothing was finished for --hang_timeout_s={limit_s:g}: a process of the run hangs')


def _late(limit_s: int) -> None:
  """Ends this process where the others haven't come."""
  words = _heard.let_out() if _heard else ''
  if _place is None:
    told = f'the launcher has not told within --join_timeout_s={limit_s} where the processes of the run meet'
  else:
    told = f'not all {_place.num_processes} processes have come within --join_timeout_s={limit_s} to {_place.told("coordinator")}'
    told += f', where this one is {_place.told("process_id")}: {meeting.why_late(_place, words)}'
  if not _joined:  # by now
    _say(f'error: {told}')
    os._exit(FAILED)


def _lost(why: str) -> None:
  """Ends this process because of another, and tells where it stood."""
  _dump(f'error: {why}')
  leave(FAILED, why)


def _dump(line: str) -> None:
  _say(line)
  with contextlib.suppress(OSError):
    faulthandler.dump_traceback(file=2, all_threads=True)


def _say(line: str) -> None:
  with contextlib.suppress(OSError):
    os.write(2, f'{line}\n'.encode())  # not by the stream: whoever holds its lock may never let go


def _catch_aborts() -> None:
  """JAX aborts a process whose coordinator is lost, or whose peer has sent no sign of life for 100 s, past any handler of Python's."""
  number = int(signal.SIGABRT)
  libc = ctypes.CDLL(None)
  libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
  libc.signal(number, ctypes.cast(_on_abort, ctypes.c_void_p))


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
  del number
  if _leaving is not None:  # all is done and told: the coordinator's process was the faster
    os._exit(_leaving)
  words = _heard.stop() if _heard and not _joined else ''
  if _place and (told := meeting.why_refused(_place, words)):
    _say(f'error: {told}')
    os._exit(errors.UserError.exit_code)
  if _heard:
    _heard.let_out()
  told = 'error: aborted by a library, whose words stand above: most often the coordinator or another process of the run is lost'
  (_dump if _joined else _say)(told)
  os._exit(FAILED)
