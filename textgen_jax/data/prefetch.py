"""Makes the next batches while the current one trains."""

import collections
import concurrent.futures
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar('T')


def prefetch(make: Callable[[int], T], start: int, stop: int, depth: int = 2) -> Generator[T, None, None]:
  """Yields make(start) ... make(stop - 1), with up to `depth` of them made ahead by one thread.

  What `make` raises, the consumer gets at that step. The thread ends with the generator: at its last item, at an exception, at
  `close()`. A consumer that may leave early says so: `with contextlib.closing(prefetch(...)) as batches`.
  """
  pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='prefetch')
  waiting: collections.deque[concurrent.futures.Future[T]] = collections.deque()
  try:
    for step in range(start, stop):
      waiting.append(pool.submit(make, step))
      if len(waiting) > depth:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)
