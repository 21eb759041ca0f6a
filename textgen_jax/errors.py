"""What can go wrong for a user, each kind with the exit code that scripts rely on."""

import difflib
from collections.abc import Iterable


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
  near = difflib.get_close_matches(value, choices, 1)
  return UserError(f'{field}={value!r} is none of {", ".join(choices)}' + (f'; did you mean {near[0]!r}?' if near else ''))
