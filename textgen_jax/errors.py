"""What can go wrong for a user, each kind with the exit code that scripts rely on."""

import difflib
import re
from collections.abc import Iterable

_OUT_OF_MEMORY = re.compile('RESOURCE_EXHAUSTED|[Oo]ut of memory')  # how XLA's RuntimeErrors tell it
# A web address: a name and a password, host and path, and what is asked for, which may be a signature.
_ADDRESS = re.compile(r"""://([^/\s'"]*@)?([^\s'"?#]*)([?#][^\s'"]*)?""")


class RunError(Exception):
  """Ends a command with one line on stderr and `exit_code`, without a traceback."""

  exit_code = 1


class UserError(RunError):
  """Wrong input: names the field or file, its value and the constraint."""

  exit_code = 2


class Diverged(RunError):
  """Training can't go on: losses or gradients stay non-finite."""

  exit_code = 3


class NoGoodCheckpoint(RunError):
  """Checkpoints exist and none can be used."""

  exit_code = 4


class MachineFailed(RunError):
  """The disk, a save or a peer failed; the input isn't to blame."""

  exit_code = 5


class TimeIsUp(RunError):
  """The run's time limit was reached, and its last finished step saved: started again, it goes on."""

  exit_code = 75


class Stopped(RunError):
  """A signal ended the run after its last finished step was saved."""

  def __init__(self, message: str, signal_number: int):
    super().__init__(message)
    self.exit_code = 128 + signal_number


def not_among(field: str, value: str, choices: Iterable[str]) -> UserError:
  """The error for a value that is none of a field's choices, with the nearest of them."""
  choices = list(choices)
  near = difflib.get_close_matches(value[:100], choices, 1)  # a file may hold a name of megabytes
  return UserError(f'{field}={value[:1000]!r} is none of {", ".join(choices)}' + (f'; did you mean {near[0]!r}?' if near else ''))


def is_out_of_memory(error: BaseException) -> bool:
  """Whether the host's memory or a device's didn't do."""
  return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error))))


def without_secrets(text: str) -> str:
  """`text`, whose web addresses have no passwords and no queries left."""
  return _ADDRESS.sub(lambda match: f'://{"***@" if match[1] else ""}{match[2]}{"?***" if match[3] else ""}', text)
