"""train.py, but process 1 lingers after it has told that it is done, and the coordinator's process is gone before it ends."""

import sys
import time

import train
from textgen_jax import launch

announce = launch.announce


def linger(code, told):
  announce(code, told)
  time.sleep(60 * ('--process_id=1' in sys.argv))


if __name__ == '__main__':
  launch.announce = linger
  sys.exit(train.main(sys.argv))
