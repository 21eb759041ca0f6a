"""Runs of train.py in several processes of one machine, each with fake devices of its own."""

import pathlib
import signal
import socket
import subprocess
import sys
import time

import fault_runs

PATIENCE_S = 120
CONFIG = """
from textgen_jax import experiment, sharding
from textgen_jax.data import corpora
from textgen_jax.models import lstm, transformer
from textgen_jax.training import optimizer


def get_config():
  model, windows = {model}
  return experiment.Experiment(
    data=corpora.DataConfig(path={text!r}),
    model=model,
    optimizer=optimizer.OptimizerConfig(peak_lr=1e-2, warmup_steps=5, schedule_steps=40),
    sharding=sharding.ShardingConfig(data=-1, fsdp={fsdp}),
    training=experiment.TrainingConfig(
      num_steps=20,
      batch_size=8,
      sequence_length=8,
      windows=windows,
      log_every_steps=1,
      eval_every_steps=10,
      checkpoint_every_steps=10,
      keep_checkpoints=9,
      sample_tokens=10,
      sample_prompt='She',
      sample_temperatures=(0.0,),
    ),
  )
"""
MODELS = {
  'transformer': "transformer.TransformerConfig(dim=16, num_layers=1, num_heads=2, vocab_multiple=8), 'random'",
  'lstm': "lstm.LSTMConfig(dim=16, num_layers=1, vocab_multiple=8), 'contiguous'",
}


class Cluster:
  """Starts the processes of runs of one configuration."""

  def __init__(self, directory, kind, fsdp=2):
    text = directory / 'text.txt'
    text.write_text(fault_runs.TEXT)
    self.directory, self.config = directory, directory / f'{kind}.py'
    self.config.write_text(CONFIG.format(model=MODELS[kind], text=str(text), fsdp=fsdp))
    self.environment = fault_runs.environment(directory)

  def start(self, workdir, count, *more, devices=1, script='train.py', only=None, flags=None, **environment):
    """`only`: the processes that come; `flags`: what each is told, instead of who it is."""
    port = free_port()
    started = []
    for i in range(count) if only is None else only:
      who = [f'--coordinator=127.0.0.1:{port}', f'--num_processes={count}', f'--process_id={i}'] if count > 1 else []
      command = [sys.executable, script, f'--config={self.config}', f'--workdir={workdir}', *(who if flags is None else flags(i)), *more]
      surroundings = self.environment | {'JAX_NUM_CPU_DEVICES': str(devices)} | {k: v.format(i=i) for k, v in environment.items()}
      started.append(fault_runs.Process(pathlib.Path(workdir), command, surroundings))
    return started

  def finish(self, workdir, count, *more, **how):
    """To the end; gives what each said."""
    started = self.start(workdir, count, *more, **how)
    for one in started:
      assert one.wait() == 0, '\n--\n'.join(each.said()[-3000:] for each in started)
    return [one.said() for one in started]


def free_port():
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return found.getsockname()[1]


def seconds_until_end(process):
  began = time.monotonic()
  code = process.wait()
  return code, time.monotonic() - began


def stop_for_good(process):
  """As a machine that freezes: the process stands still, and nobody hears of it."""
  process.send(signal.SIGSTOP)


def hashes(cluster, workdir, count, devices):
  """What each process of so many reads of the newest checkpoint and of the first batches: lines of JSON, which must be the same."""
  port = free_port()
  script = fault_runs.ROOT / 'tests' / 'read_on_processes.py'
  arguments = [str(cluster.config), str(workdir), str(port), str(count)]
  started = [
    subprocess.Popen(
      [sys.executable, str(script), *arguments, str(i), str(min(2, count * devices))],
      cwd=fault_runs.ROOT,
      env=cluster.environment | {'JAX_NUM_CPU_DEVICES': str(devices)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(count)
  ]
  lines = []
  for one in started:
    out, told = one.communicate(timeout=PATIENCE_S)
    assert one.returncode == 0, told[-3000:]
    lines.append(out.splitlines()[-1])  # Gloo tells of its connections before
  return lines
