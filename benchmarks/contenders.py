"""Contenders that take turns, each in a process of its own that sleeps while another is timed."""

import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

PAUSE_S = 0.2  # before a measurement, so that the threads of the one before have gone to sleep


def timed(work: Callable[..., Any], *request: Any) -> tuple[float, Any]:
  time.sleep(PAUSE_S)
  began = time.perf_counter()
  given = work(*request)
  return time.perf_counter() - began, given


def serve(work: Callable[..., Any]) -> None:
  """In the contender's process: times what stdin asks for, a line of JSON a request."""
  for line in sys.stdin:
    print(json.dumps(timed(work, *json.loads(line))), flush=True)


class Apart:
  """A script's contender of that name; the script is called with `--serve NAME` and `more`, and calls `serve`."""

  def __init__(self, script: str, name: str, more: Sequence[str] = ()):
    command = [sys.executable, str(pathlib.Path(script).resolve()), '--serve', name, *more]
    self._name, self._process = name, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

  def __call__(self, *request: Any) -> tuple[float, Any]:
    print(json.dumps(request), file=self._process.stdin, flush=True)
    line = self._process.stdout.readline()
    if not line:
      raise SystemExit(f'{self._name} ended with {self._process.wait()}')
    seconds, given = json.loads(line)
    return seconds, given

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()
