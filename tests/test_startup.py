"""Commands start lightly: help and a wrong flag don't wait for JAX, and Ctrl-C amid the imports is no traceback."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest

import sample
import train
from textgen_jax import compilation, errors, generator, signals, trainer, workdir
from textgen_jax.tools import evaluate, inspect_samples, replay, score, sweep_sampling

ROOT = pathlib.Path(__file__).parent.parent
TOOLS = sorted(path.stem for path in (ROOT / 'textgen_jax/tools').glob('*.py') if '\ndef main(' in path.read_text())
COMMANDS = ['sample.py', 'train.py', *(f'textgen_jax.tools.{name}' for name in TOOLS)]
# These work with arrays all through, and import JAX before they read flags.
ARRAYS = {'textgen_jax.tools.replay', 'textgen_jax.tools.verify_resume'}
# Runs a command as `python COMMAND` does, and tells what it has imported of what is slow.
TELL = """
import atexit, runpy, sys
slow = ('jax', 'flax', 'optax', 'orbax', 'tensorboardX', 'torch')
atexit.register(lambda: print('imported:', *(name for name in slow if name in sys.modules), file=sys.stderr))
command = sys.argv[1]
sys.argv = sys.argv[1:]
runpy.run_path(command, run_name='__main__') if command.endswith('.py') else runpy.run_module(command, run_name='__main__', alter_sys=True)
"""


def imported(*argv, code):
  done = subprocess.run([sys.executable, '-c', TELL, *argv], cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert done.returncode == code, done.stderr
  assert 'Traceback' not in done.stderr
  return done.stderr.splitlines()[-1].removeprefix('imported:').split()


@pytest.mark.parametrize('command', [one for one in COMMANDS if one not in ARRAYS])
def test_a_wrong_flag_does_not_wait_for_jax(command):
  assert imported(command, '--no_such_flag=1', code=2) == []


@pytest.mark.parametrize('command', [one for one in COMMANDS if one not in ARRAYS | {'train.py'}])  # that one's lists an experiment
def test_help_does_not_wait_for_jax(command):
  assert imported(command, '--help', code=0) == []


@pytest.mark.parametrize(
  'argv',
  [
    ('sample.py', '--workdir=x', '--temperature=-1'),
    ('sample.py', '--workdir=x', '--interactive', '--stream'),
    ('train.py', '--config=configs/debug.py'),
    ('train.py', '--config=configs/nothing.py', '--workdir=x'),
  ],
)
def test_nor_does_what_flags_say_that_cannot_be(argv):
  assert imported(*argv, code=2) == []


def test_what_the_fields_say_waits_for_jax_and_no_more():
  assert set(imported('train.py', '--config=configs/debug.py', '--workdir=x', '--config.model.dmi=1', code=2)) == {'jax', 'flax', 'optax'}


@pytest.mark.parametrize('command', COMMANDS)
def test_ctrl_c_amid_the_imports_is_no_traceback(command, tmp_path):
  """A module that takes its time stands for the ones that take theirs: the signal always comes amid an import."""
  (tmp_path / 'absl').mkdir()
  (tmp_path / 'absl' / '__init__.py').write_text('import sys, time\nprint("importing", flush=True)\ntime.sleep(60)\n')
  argv = [command] if command.endswith('.py') else ['-m', command]
  process = subprocess.Popen(
    [sys.executable, *argv, '--help'],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(tmp_path), str(ROOT)])},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'importing\n'
  process.send_signal(signal.SIGINT)
  _, told = process.communicate(timeout=60)
  assert (process.returncode, told) == (130, 'error: SIGINT: nothing was left unsaved\n')


UNWATCH = """
import signal, time
from textgen_jax import signals
signals.watch()
{before}
try:
  print('ready', flush=True)
  time.sleep(60)
except KeyboardInterrupt:
  print('ours', flush=True)
"""


@pytest.mark.parametrize(('before', 'out', 'code'), [('', '', 130), ('signals.unwatch()', 'ours\n', 0)])
def test_a_command_that_has_started_may_answer_itself(before, out, code):
  # Under nohup and the like SIGINT is ignored, and children inherit that.
  ours = signal.signal(signal.SIGINT, signal.default_int_handler)
  process = subprocess.Popen([sys.executable, '-c', UNWATCH.format(before=before)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
  signal.signal(signal.SIGINT, ours)
  assert process.stdout.readline() == 'ready\n'
  process.send_signal(signal.SIGINT)
  assert (process.communicate(timeout=60)[0], process.returncode) == (out, code)


UNREAD = """
import sys
from textgen_jax import signals
signals.watch()
print('ready', file=sys.stderr, flush=True)
print('x' * (1 << 24), flush=True)
"""


def test_a_pipe_that_nobody_reads_holds_up_no_signal():
  process = subprocess.Popen([sys.executable, '-c', UNREAD], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  assert process.stderr.readline() == 'ready\n'
  time.sleep(0.3)  # it is in its write by then; were it not, it would leave all the same
  process.send_signal(signal.SIGINT)
  assert process.wait(timeout=signals.LAST_WORDS_S + 30) == 130
  process.stdout.close()
  process.stderr.close()


class Reached(errors.UserError):
  """Where a command begins to compile."""


@pytest.mark.parametrize(
  ('main', 'owner', 'name', 'argv'),
  [
    (train.main, trainer, 'train', ['--config=configs/debug.py']),
    (sample.main, generator.Generator, 'load', []),
    (evaluate.main, workdir, 'load', []),
    (score.main, workdir, 'load', ['--text=a']),
    (inspect_samples.main, workdir, 'load', []),
    (sweep_sampling.main, workdir, 'load', []),
    (replay.main, replay, 'replay', ['--step=1']),
  ],
)
def test_whatever_compiles_keeps_it(monkeypatch, main, owner, name, argv):
  happened = []

  def reached(*args, **kwargs):
    happened.append('work')
    raise Reached('enough')

  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(compilation, 'keep_compiled', lambda: happened.append('kept'))
  monkeypatch.setattr(owner, name, reached)
  assert main(['command', '--workdir=nowhere', *argv]) == 2
  assert happened == ['kept', 'work']


@pytest.mark.parametrize('installed', ['here = True\n', 'raise SystemExit("torch was imported")\n'])
def test_torch_is_hidden_only_while_tensorboard_is_imported(tmp_path, installed):
  (tmp_path / 'torch.py').write_text(installed)
  later = 'import torch\nassert torch.here\nmetrics._tensorboard()\nassert sys.modules["torch"] is torch\n' if 'here' in installed else ''
  code = f'import sys\nfrom textgen_jax.training import metrics\nmetrics._tensorboard()\nassert "torch" not in sys.modules\n{later}'
  path = os.pathsep.join([str(tmp_path), str(ROOT)])
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env={**os.environ, 'PYTHONPATH': path}, capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, '')


@pytest.mark.parametrize(
  ('dtype', 'model', 'rows', 'devices'),
  [
    ('float32', '', 2, 2), ('bfloat16', '', 32, 1),
    ('float32', 'model=lstm.LSTMConfig(), ', 32, 2), ('bfloat16', 'model=lstm.LSTMConfig(), ', 32, 2),
    ('float32', 'model=lstm.LSTMConfig(), ', 30, 1),
  ],
)  # fmt: skip
def test_how_many_devices_a_cpu_becomes(dtype, model, rows, devices):
  """One where a Transformer's products are of bfloat16, or an LSTM's rows would be few; else one a core."""
  code = (
    'import jax; from textgen_jax import compilation, experiment, sharding; sharding._quota = lambda: 2; '
    'from textgen_jax.models import lstm; sharding.os.sched_getaffinity = lambda _: {0, 1}; '
    f'e = experiment.Experiment({model}training=experiment.TrainingConfig(batch_size={rows}, product_dtype={dtype!r})); '
    'compilation.split_cores(e); '
    'print(jax.device_count(), jax.config.values["jax_cpu_enable_async_dispatch"])'
  )
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=environment, timeout=120, check=True)
  devices = devices if jax.__version_info__[:2] in compilation._PATIENT_VERSIONS else 1
  assert done.stdout.split() == [str(devices), str(devices > 1)]  # one device of all cores runs a step where it is called
