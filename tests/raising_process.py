"""train.py, whose second process fails to read a batch: `python tests/raising_process.py FLAGS OF TRAIN.PY`."""

import sys

import train
from textgen_jax import processes
from textgen_jax.data import windows

FAILS_AT = 15


def main(argv):
  read = windows.RandomWindows.batch

  def batch(self, step, rows=windows.ALL_ROWS):
    if processes.index() == 1 and step >= FAILS_AT:
      raise ValueError('no such row')
    return read(self, step, rows)

  windows.RandomWindows.batch = batch
  return train.main(argv)


if __name__ == '__main__':
  sys.exit(main(sys.argv))
