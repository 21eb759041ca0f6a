"""Imports run one way, in DESIGN.md's order, and importing does nothing."""

import ast
import pathlib
import subprocess
import sys

import pytest

import textgen_jax

ROOT = pathlib.Path(textgen_jax.__file__).parent

# From the bottom up; a module may import from its own line and from those above it.
ORDER = [
  {'axes', 'backend', 'errors', 'processes', 'trees'},
  {'text', 'statistics'},
  {'data'},
  {'models'},
  {'sharding'},
  {'training', 'sampling'},
  {'experiment'},
  {'workdir', 'command_line', 'compilation', 'signals', 'allocator', 'launch', 'launch_flags', 'meeting'},
  {'program'},
  {'assembly', 'generator', 'interactive'},
  {'memory', 'rerun'},
  {'planning'},
  {'watch'},
  {'trainer'},
  {'tools'},
]
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}
SAMPLING_KNOWS = {'axes', 'backend', 'errors', 'trees', 'text', 'models', 'sampling'}


def modules():
  """The path of every module, by its dotted name within the package."""
  paths = {'.'.join(path.relative_to(ROOT).with_suffix('').parts): path for path in ROOT.rglob('*.py')}
  return {name.removesuffix('.__init__'): path for name, path in paths.items() if name != '__init__'}


def imported(source, names):
  """What a module imports of the package, wherever in the file, as dotted names within it."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'relative import of {node.module}'
      # A name is a module of the package, or a symbol of one.
      within = (node.module or '').removeprefix('textgen_jax').lstrip('.')
      for alias in node.names:
        name = f'{within}.{alias.name}'.lstrip('.')
        found.add(f'{node.module}.{alias.name}' if name in names else node.module)
  return {name.removeprefix('textgen_jax.') for name in found if name.startswith('textgen_jax.')}


def edges():
  names = modules()
  return {name: imported(path.read_text(), names) for name, path in names.items()}


def complaint(user, used):
  """Why `user` must not import `used`, both dotted names within the package; None where it may."""
  own, other = user.split('.')[0], used.split('.')[0]
  for part in (own, other):
    if part not in RANK:
      return f'{part} has no place in the order'
  if RANK[other] > RANK[own]:
    return f'{own} stands below {other}'
  if {own, other} == {'training', 'sampling'}:
    return 'training and sampling do not meet'
  if own == 'sampling' and other not in SAMPLING_KNOWS:
    return f'sampling does not know {other}'
  if other == 'models' and own != 'models':
    known = {'models.base'}
    if RANK[own] >= RANK['experiment']:
      known.add('models.build')
    if own == 'experiment':
      known |= {'models.transformer', 'models.lstm'}  # for the defaults
    if used not in known:
      return f'{own} does not know {used}'
  return None


def cycle(edges):
  """A circle of imports, or None."""
  done, path = set(), []

  def visit(name):
    if name in path:
      return [*path[path.index(name) :], name]
    if name in done:
      return None
    path.append(name)
    for used in sorted(edges.get(name, ())):
      if found := visit(used):
        return found
    done.add(path.pop())
    return None

  return next(filter(None, map(visit, sorted(edges))), None)


def test_imports_run_down_the_order():
  found = edges()
  assert {'models.base', 'models.layers'} <= found['models.transformer']  # the reader reads
  assert sum(map(len, found.values())) > 50
  complaints = [f'{user} imports {used}: {why}' for user, all_used in found.items() for used in all_used if (why := complaint(user, used))]
  assert not complaints, '\n'.join(sorted(complaints))
  assert all(used in found for all_used in found.values() for used in all_used)


def test_no_circles():
  assert cycle(edges()) is None


@pytest.mark.parametrize(
  ('user', 'used'),
  [
    ('trees', 'text.base'),
    ('text.byte', 'data.windows'),
    ('data.prepare', 'models.base'),
    ('models.base', 'training.losses'),
    ('training.step', 'sampling.generate'),
    ('sampling.score', 'training.losses'),
    ('sampling.generate', 'data.windows'),
    ('training.step', 'models.transformer'),
    ('training.step', 'models.build'),
    ('sampling.generate', 'models.lstm'),
    ('trainer', 'models.attention'),
    ('tools.evaluate', 'models.transformer'),
    ('sharding', 'models.layers'),
    ('experiment', 'trainer'),
    ('workdir', 'tools.evaluate'),
    ('tools.evaluate', 'novelty'),
  ],
)
def test_wrong_directions_are_seen(user, used):
  assert complaint(user, used)


def test_every_way_of_importing_is_seen():
  source = """
import numpy, textgen_jax.text.base
from textgen_jax import trees as t
from textgen_jax.sampling.params import SamplingParams
def late():
  from textgen_jax.models import base
"""
  names = {'text.base', 'trees', 'sampling.params', 'models.base'}
  assert imported(source, names) == names
  with pytest.raises(AssertionError, match='relative'):
    imported('from . import base', names)


def test_circles_are_seen():
  assert cycle({'a': {'b'}, 'b': {'c'}, 'c': {'b'}}) == ['b', 'c', 'b']
  assert cycle({'a': {'b', 'c'}, 'b': {'c'}, 'c': set()}) is None


def test_modules_only_import_and_define():
  allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
  for name, path in modules().items():
    for node in ast.parse(path.read_text()).body:
      documents = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
      conditional = isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", 'TYPE_CHECKING')
      derivative = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func).endswith('.defvjp')
      assert isinstance(node, allowed) or documents or conditional or derivative, f'{name}, line {node.lineno}: {ast.unparse(node)[:80]}'


def run(code):
  return subprocess.run([sys.executable, '-c', code], cwd=ROOT.parent, capture_output=True, text=True, check=False)


def test_importing_everything_starts_no_backend_and_says_nothing():
  lines = [f'import textgen_jax.{name}' for name in sorted(modules())]
  done = run('\n'.join([*lines, 'from jax._src import xla_bridge', 'assert not xla_bridge.backends_are_initialized()']))
  assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_flags_are_checked_before_the_slow_imports():
  """What train.py and sample.py import first: a wrong flag is answered without waiting for the checkpoint library."""
  heads = ['textgen_jax.command_line', 'textgen_jax.compilation', 'textgen_jax.experiment', 'textgen_jax.sampling.params']
  heads += ['textgen_jax.sampling.journal', 'textgen_jax.sampling.manifest']
  check = "slow = {'orbax', 'tensorboardX', 'textgen_jax.trainer', 'textgen_jax.training.checkpoints'} & set(sys.modules)"
  done = run('\n'.join(['import sys', *(f'import {head}' for head in heads), check, 'print(*slow)']))
  assert (done.returncode, done.stdout.strip()) == (0, '')
