import contextlib
import threading

import pytest

from textgen_jax.data import prefetch


def prefetch_threads():
  return [thread for thread in threading.enumerate() if thread.name.startswith('prefetch')]


@pytest.mark.parametrize('depth', [1, 2, 50])
def test_yields_every_step_in_order(depth):
  assert list(prefetch.prefetch(lambda step: step * step, range(3, 20), depth)) == [step * step for step in range(3, 20)]
  assert list(prefetch.prefetch(str, ())) == []
  assert not prefetch_threads()


def test_works_ahead_and_no_further_than_depth():
  made, third = [], threading.Event()

  def make(step):
    made.append(step)
    if step == 2:
      third.set()
    return step

  with contextlib.closing(prefetch.prefetch(make, range(100), depth=2)) as batches:
    assert next(batches) == 0
    assert third.wait(10)
    assert made == [0, 1, 2]
  assert not prefetch_threads()


def test_failure_reaches_the_consumer_at_its_step():
  def make(step):
    if step == 2:
      raise KeyError('broken')
    return step

  batches = prefetch.prefetch(make, range(9))
  assert [next(batches), next(batches)] == [0, 1]
  with pytest.raises(KeyError, match='broken'):
    next(batches)
  assert not prefetch_threads()
