"""The processes of one run: which this one is, and how they agree.

A process alone agrees with itself, which costs nothing. The functions that processes agree by are called by all of them, in
the same order, by the main thread.
"""

import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

# JAX has no other place where values are kept for all processes, and orbax uses it too.
from jax._src.distributed import global_state

from textgen_jax import errors

T = TypeVar('T')

KINDS = (errors.UserError, errors.Diverged, errors.NoGoodCheckpoint, errors.MachineFailed, errors.TimeIsUp)
FAR_MS = 7 * 24 * 3600 * 1000  # a wait that only an end of the run cuts short
NETWORK_DISK_S = 30.0  # until what one process has written is seen by another
LOOKS_AHEAD = 2  # dispatches: no process can be further ahead of another

# Of the main thread, which alone agrees with the others.
_asked = 0  # questions to the leader so far
_met = 0  # times that all processes have told each other something
_runs = 0  # that have begun in this process
_alone = False  # within what the leader alone does
_beaten: float | None = None  # when something was last finished


def count() -> int:
  """Processes of the run."""
  return global_state.num_processes if global_state.client else 1


def index() -> int:
  return global_state.process_id if global_state.client else 0


def is_leader() -> bool:
  """Whether this process writes logs, and decides."""
  return index() == 0


def from_leader(function: Callable[[], T]) -> T:
  """What `function` gives on the leader, which alone calls it; others wait. It is JSON. What it raises of ours, all raise.

  Whatever the leader alone is to do is done so: writing, and deciding by what a disk or a clock says.
  """
  global _asked, _alone
  if count() == 1 or _alone:
    return function()
  _asked += 1
  key = f'answer/{_asked}'
  if not is_leader():
    answer: dict[str, Any] = json.loads(client().blocking_key_value_get(key, FAR_MS))
    if 'code' in answer:
      raise as_error(answer['code'], answer['told'])
    return answer['value']
  mine, _alone = None, True
  try:
    answer = {'value': function()}
  except errors.RunError as error:
    mine, answer = error, {'code': error.exit_code, 'told': str(error)}
  finally:
    _alone = False
  client().key_value_set(key, json.dumps(answer))  # some a checkpoint, and small: they needn't be deleted
  if mine is not None:
    raise mine
  return answer['value']


def meet() -> None:
  """Waits for all processes."""
  global _met
  if count() > 1 and not _alone:
    _met += 1
    client().wait_at_barrier(f'met/{_met}', FAR_MS)


def everyone(value: T) -> list[T]:
  """Each process's value, JSON and small, in the order of the processes; all wait for all."""
  if count() == 1 or _alone:
    return [value]
  name = f'value/{_met + 1}/'
  client().key_value_set(f'{name}{index()}', json.dumps(value))
  meet()
  values = client().key_value_dir_get(name)  # one question, however many they are
  return [json.loads(text) for _, text in sorted(values, key=lambda item: int(item[0].rpartition('/')[2]))]


def tell(name: str, value: Any) -> None:
  """Leaves a value, JSON, for `told`; any thread may. No process uses a name twice."""
  client().key_value_set(f'told/{name}/{index()}', json.dumps(value))


def told(name: str) -> list[Any]:
  """What each process has left, or will leave, under a name."""
  return [json.loads(client().blocking_key_value_get(f'told/{name}/{i}', FAR_MS)) for i in range(count())]


def sharers() -> tuple[int, int]:
  """Which of how many share what can be shared out: this process of all, or of itself where it works alone."""
  return (0, 1) if _alone else (index(), count())


def same(what: dict[str, Any]) -> None:
  """Raises UserError on every process where one has another value of anything than the leader has: `{field: value}`."""
  ours = {name: repr(value) for name, value in what.items()}
  leaders = from_leader(lambda: ours)
  differing = [name for name in {**leaders, **ours} if leaders.get(name) != ours.get(name)][:1]
  complaints = everyone([f'{name}={ours.get(name)}, and process 0 has {leaders.get(name)}' for name in differing])
  for i, complaint in enumerate(complaints):
    if complaint:
      raise errors.UserError(f'process {i} of {count()} has {complaint[0]}')


def all_see(path: pathlib.Path) -> None:
  """Raises UserError where a process doesn't find a file that the leader has written, in the same words: their folders are others."""
  if count() == 1:
    return
  words = from_leader(lambda: path.read_text(encoding='utf-8'))
  until = time.monotonic() + NETWORK_DISK_S
  while not (found := path.is_file() and path.read_text(encoding='utf-8') == words) and time.monotonic() < until:
    time.sleep(0.2)
  blind = [i for i, sees in enumerate(everyone(found)) if not sees]
  if blind:
    raise errors.UserError(f"process {blind[0]} of {count()} doesn't see {path}, which process 0 has written: all need the same folder")


class Lockstep:
  """Has all processes stop after the same dispatch, whichever of them has a reason to: an exit code and its cause."""

  def __init__(self) -> None:
    global _runs
    _runs += 1
    self._key = f'stop/{_runs}'
    self._dispatch = 0
    self._agreed: list[Any] | None = None  # dispatch, exit code, cause

  def look(self, own: tuple[int, str] | None) -> tuple[int, str] | None:
    """Called after each dispatch, on every process, with this one's reason, if it has one; gives the agreed one in its time.

    A process that has a reason asks for a stop `LOOKS_AHEAD` dispatches later. By then all others have seen it: none goes out
    with a dispatch before it has read the results of the one before the last, which need every process. It costs a question to the
    coordinator, about a millisecond.
    """
    self._dispatch += 1
    if count() == 1:
      return own
    store = client()
    if own is not None and self._agreed is None:
      with contextlib.suppress(RuntimeError):  # another process was first
        store.key_value_set(self._key, json.dumps([self._dispatch + LOOKS_AHEAD, *own]), allow_overwrite=False)
    if self._agreed is None:
      try:
        self._agreed = json.loads(store.key_value_try_get(self._key))
      except RuntimeError:  # nobody wants to
        return None
    dispatch, code, cause = self._agreed
    return (code, cause) if self._dispatch >= dispatch else None


def as_error(code: int, told: str) -> errors.RunError:
  """The error that ends a run with this exit code."""
  if code > 128:
    return errors.Stopped(told, code - 128)
  return next((kind(told) for kind in KINDS if kind.exit_code == code), errors.MachineFailed(told))


def begin_beating() -> None:
  """A step is finished: from here on, too long without a `beat` is a hang (`launch`)."""
  global _beaten
  _beaten = time.monotonic()


def beat() -> None:
  """Something is finished: a batch, a save."""
  if _beaten is not None:
    begin_beating()


def rest() -> None:
  """No beat is to be expected."""
  global _beaten
  _beaten = None


@contextlib.contextmanager
def resting() -> Iterator[None]:
  """Within it no beat is to be expected: what is waited for has a limit of its own."""
  beating = _beaten is not None
  rest()
  yield
  if beating:
    begin_beating()


def last_beat() -> float | None:
  """When something was last finished; None where no beat is to be expected."""
  return _beaten


def client() -> Any:
  """The coordinator's, where there are several processes."""
  return global_state.client
