"""Makes the next batches while the current one trains."""

import collections
import concurrent.futures
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

T = TypeVar('T')
Place = TypeVar('Place')


def prefetch(make: Callable[[Place], T], places: Iterable[Place], depth: int = 2) -> Generator[T, None, None]:
  """Yields `make` of each of `places`, with up to `depth` of them made ahead by one thread.

  What `make` raises, the consumer gets at that place. The thread ends with the generator: at its last item, at an exception, at
  `close()`. A consumer that may leave early says so: `with contextlib.closing(prefetch(...)) as batches`.
  """
  pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='prefetch')
  waiting: collections.deque[concurrent.futures.Future[T]] = collections.deque()
  try:
    for place in places:
      waiting.append(pool.submit(make, place))
      if len(waiting) > depth:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)
