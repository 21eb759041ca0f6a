"""SIGTERM and Ctrl-C at any moment: the last finished step is saved, and the run goes on from there as if nothing had been."""

import os
import random
import signal
import threading
import time

import fault_runs

import train
from textgen_jax import signals

MOMENTS = ('training', 'saving', 'compiling', 'evaluating', 'sampling', 'starting')
# Saves that take their time.
SLOWLY = """
import sys, time
from textgen_jax import signals
signals.watch()
from textgen_jax.training import integrity
seal = integrity.seal
integrity.seal = lambda *args: (time.sleep({seconds}), seal(*args))
import train
sys.exit(train.main(sys.argv))
"""


def test_stopped_at_random_moments(runs_of, tmp_path):
  runs, rng = runs_of('transformer'), random.Random(0)
  workdir, history = tmp_path / 'stopped', []
  for n, moment in enumerate(MOMENTS):
    more = fault_runs.SAMPLES if moment == 'sampling' else ()
    found = fault_runs.stopped(runs, workdir, moment, (signal.SIGTERM, signal.SIGINT)[n % 2], rng, *more)
    history.append((moment, fault_runs.logged_step(workdir), found and found[1]))
  print(*history, sep='\n')
  assert sum(found is not None for _, _, found in history) > len(MOMENTS) // 2, history
  assert f'going on from step {fault_runs.logged_step(workdir)}' in runs.finish(workdir)
  fault_runs.assert_same_end(workdir, runs.whole)


def test_a_second_signal_leaves_at_once_though_a_save_is_slow(runs_of, tmp_path):
  runs, workdir = runs_of('lstm'), tmp_path / 'slow'
  process = runs.start(workdir, script=('-c', SLOWLY.format(seconds=1000)))
  assert process.until(lambda: fault_runs.logged_step(workdir) >= fault_runs.SAVE_EVERY)
  assert process.until(lambda: list((workdir / 'checkpoints').glob('3.*tmp*')))
  process.send(signal.SIGTERM)
  time.sleep(0.5)
  assert process.poll() is None  # it waits for the save
  process.send(signal.SIGTERM)
  assert process.wait() == 143
  assert process.said().splitlines()[-1] == 'error: SIGTERM: left at once; the last save holds'
  assert fault_runs.saved_steps(workdir) == []
  runs.finish(workdir)
  fault_runs.assert_same_end(workdir, runs.whole)


def test_a_slow_save_is_waited_for(runs_of, tmp_path):
  runs, workdir = runs_of('lstm'), tmp_path / 'slow'
  process = runs.start(workdir, script=('-c', SLOWLY.format(seconds=2)))
  assert process.until(lambda: list((workdir / 'checkpoints').glob('*tmp*')))
  process.send(signal.SIGINT)
  assert process.wait() == 130
  saved = fault_runs.saved_steps(workdir)[-1]
  assert process.said().splitlines()[-1].startswith(f'error: SIGINT: step {saved} is saved')
  assert fault_runs.logged_step(workdir) == saved


def test_one_trainer_a_workdir_and_a_terminal_that_goes_away(runs_of, tmp_path, capsys):
  """Its terminal is closed, another trainer comes by, SIGHUP ends it, and it goes on without any stream: the run is whole all the same."""
  runs, workdir = runs_of('transformer'), tmp_path / 'left'
  terminal, its_end = os.openpty()
  ours = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # what we ignore, under nohup, our children do too
  process = runs.start(workdir, stderr=its_end)
  signal.signal(signal.SIGHUP, ours)
  os.close(its_end)
  assert process.until(lambda: fault_runs.logged_step(workdir) >= 1)
  os.close(terminal)
  assert process.until(lambda: fault_runs.logged_step(workdir) >= 5)
  assert train.main(runs.argv(workdir)) == 2
  told = capsys.readouterr().err.splitlines()
  assert [line for line in told if 'error' in line] == told[-1:], told
  assert f"error: workdir='{workdir}' is being trained by process {process.pid} on " in told[-1]
  process.send(signal.SIGHUP)
  assert process.wait() == -signal.SIGHUP
  process = runs.start(workdir, shell='exec "$@" <&- >&- 2>&-')
  assert (process.wait(), process.said()) == (0, '')
  fault_runs.assert_same_end(workdir, runs.whole)


def make_stop():
  left = []
  return signals.Stop(lambda number, told, code: left.append((told, code))), left


def test_what_a_signal_does_depends_on_what_is_unsaved(capfd):
  stop, left = make_stop()
  stop.hold()
  stop.came(signal.SIGTERM)
  assert (stop.number, left) == (signal.SIGTERM, [])
  assert 'SIGTERM: stopping after this step; a second signal leaves at once' in capfd.readouterr().err
  stop.release('step 3 is saved')
  assert stop.number == signal.SIGTERM  # the run still has to end itself
  stop.came(signal.SIGTERM)
  assert left == [('SIGTERM: left at once; the last save holds', 143)]

  stop, left = make_stop()
  stop.release('step 3 is saved', lambda: left.append('the save is waited for'))
  stop.came(signal.SIGINT)
  assert left == ['the save is waited for', ('SIGINT: step 3 is saved', 130)]
  assert stop.number == 0


def test_no_step_is_begun_while_a_signal_ends_the_process():
  """It would be lost: what is told to be saved is the step before."""
  stop, left = make_stop()
  saved, steps = threading.Event(), []
  stop.release('step 3 is saved', saved.wait)
  ending = threading.Thread(target=stop.came, args=(signal.SIGTERM,))
  ending.start()
  run = threading.Thread(target=lambda: (stop.hold(), steps.append(4)))
  run.start()
  run.join(0.3)
  assert steps == []
  saved.set()
  ending.join()
  run.join()
  assert (left, steps) == ([('SIGTERM: step 3 is saved', 143)], [4])  # only because this leave comes back


def test_a_save_that_fails_is_told_instead():
  stop, left = make_stop()
  stop.release('step 3 is saved', lambda: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
  stop.came(signal.SIGTERM)
  assert left == [('[Errno 28] No space left on device', 1)]
