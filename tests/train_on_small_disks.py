"""Trains where the disk is full, as a process of its own: it mounts small file systems, and limits the size of its files.

  unshare -rm python tests/train_on_small_disks.py DIRECTORY mount    # where a process may mount
  python tests/train_on_small_disks.py DIRECTORY limit

Prints JSON: what each row's commands answered and what lay on the disk.
"""

import contextlib
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

import fault_damage
import fault_runs
import jax

import sample
import train
from textgen_jax.training import checkpoints, metrics

NUM_STEPS, FULL_AT = 12, 7  # the step that's logged when the disk fills
ROOM = 16384  # bytes that are left: enough for the log, too little for a checkpoint


@contextlib.contextmanager
def at_step(step, do):
  """Calls `do` once, before a step's numbers are written."""
  write, done = metrics.Writer.write, []

  def write_and_do(self, at, values):
    if at == step and not done:
      done.append(do())
    write(self, at, values)

  metrics.Writer.write = write_and_do
  try:
    yield
  finally:
    metrics.Writer.write = write


def fill(disk, room):
  system = os.statvfs(disk)
  ballast = max(0, system.f_bavail * system.f_frsize - room)
  (disk / 'ballast').write_bytes(b'x' * ballast)


def limit_files(size):
  """What is written past `size` bytes of a file fails, as past a quota."""
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


class Trials:
  def __init__(self, directory):
    text, config = directory / 'text.txt', directory / 'transformer.py'
    text.write_text(fault_runs.TEXT)
    config.write_text(fault_runs.CONFIG.format(model=fault_runs.MODELS['transformer'], text=str(text), num_steps=NUM_STEPS))
    self.config, self.whole, self.found = config, directory / 'whole', {}
    assert self.train(self.whole)['code'] == 0

  def train(self, workdir, *more):
    code, _, err = fault_damage.told(train.main, ['train.py', f'--config={self.config}', f'--workdir={workdir}', *more])
    return {'code': code, 'err': err}

  def look(self, workdir):
    """What lies there: steps that are whole, and what is unfinished."""
    kept = checkpoints.Checkpoints(workdir, read_only=True)
    return {'good': [step for step in kept.steps() if kept.problem(step) is None], 'unfinished': fault_runs.unfinished(workdir)}

  def goes_on(self, name, workdir, room_again):
    """With room again: as if nothing had been."""
    again = self.train(workdir)  # still without room: nothing gets worse
    self.found[name]['again'] = again | self.look(workdir)
    room_again()
    self.found[name]['end'] = self.train(workdir)
    fault_runs.assert_same_end(workdir, self.whole)

  def full(self, disk, name, room):
    with at_step(FULL_AT, lambda: fill(disk, room)):
      self.found[name] = self.train(disk / name)
    self.found[name] |= self.look(disk / name)
    self.goes_on(name, disk / name, (disk / 'ballast').unlink)

  def full_from_the_start(self, disk):
    fill(disk, 0)
    self.found['full from the start'] = self.train(disk / 'new')
    (disk / 'ballast').unlink()

  def compile_cache_is_full(self, disk):
    fill(disk, 0)
    old = jax.config.values['jax_compilation_cache_dir']
    jax.config.update('jax_compilation_cache_dir', str(disk))
    jax.clear_caches()
    self.found['compile cache'] = self.train(self.whole.with_name('uncached'))
    jax.config.update('jax_compilation_cache_dir', old)
    (disk / 'ballast').unlink()
    fault_runs.assert_same_end(self.whole.with_name('uncached'), self.whole)

  def log_cannot_be_written(self):
    """The last thing that a full disk lets through may be a part of a line."""
    workdir = self.whole.with_name('log')

    def limit():
      time.sleep(1)  # so that no save is under way, which would fail too
      limit_files((workdir / 'metrics.jsonl').stat().st_size + 10)

    with at_step(FULL_AT, limit):
      self.found['log'] = self.train(workdir)
    limit_files(resource.RLIM_INFINITY)
    self.found['log'] |= self.look(workdir) | {'torn': not (workdir / 'metrics.jsonl').read_bytes().endswith(b'\n')}
    assert self.train(workdir)['code'] == 0
    fault_runs.assert_same_end(workdir, self.whole)

  def files_are_limited(self):
    workdir = self.whole.with_name('limited')
    with at_step(FULL_AT, lambda: limit_files(4096)):
      self.found['limit'] = self.train(workdir)
    limit_files(resource.RLIM_INFINITY)
    self.found['limit'] |= self.look(workdir)
    self.found['limit']['end'] = self.train(workdir)
    fault_runs.assert_same_end(workdir, self.whole)

  def read_only(self, disk):
    workdir = disk / 'run'
    self.train(workdir, '--config.training.num_steps=6')
    subprocess.run(['mount', '-o', 'remount,ro', str(disk)], check=True)
    self.found['read-only'] = self.train(workdir)
    self.found['read-only, new'] = self.train(disk / 'new')
    code, out, err = fault_damage.told(sample.main, ['sample.py', f'--workdir={workdir}', '--max_new_tokens=3'])
    self.found['read-only'] |= {'sample': code, 'text': out, 'sample_err': err}


def small_disk(directory, name):
  disk = directory / name
  disk.mkdir()
  subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=6m', 'textgen_jax', str(disk)], check=True)
  return disk


def main(directory, how):
  jax.config.update('jax_disable_most_optimizations', True)
  jax.config.update('jax_compilation_cache_dir', str(directory / 'xla'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  trials = Trials(directory)
  if how == 'mount':
    disk = small_disk(directory, 'disk')
    trials.full(disk, 'a checkpoint', ROOM)
    trials.full(disk, 'everything', 0)
    trials.full_from_the_start(disk)
    trials.compile_cache_is_full(disk)
    trials.read_only(small_disk(directory, 'ro'))
  else:
    trials.files_are_limited()
    trials.log_cannot_be_written()
  print(json.dumps(trials.found))


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]), sys.argv[2])
