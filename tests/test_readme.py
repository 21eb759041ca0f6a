"""The README's worked example and scripts do what they say."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import conftest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()


def python_block(needle):
  return next(block for block in re.findall(r'```python\n(.*?)```', README, re.DOTALL) if needle in block)


def test_a_new_attention_and_a_hook(tmp_path, text_file):
  """One new file and one line in the table: it trains, resumes and samples; a hook sees what it sows."""
  for name in ('textgen_jax', 'configs'):
    shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__'))
  for name in ('train.py', 'sample.py'):
    shutil.copy(ROOT / name, tmp_path / name)
  module = python_block('class SinkAttention')
  assert module.count('\n') < 30
  (tmp_path / 'textgen_jax/models/sink_attention.py').write_text(module)
  build = tmp_path / 'textgen_jax/models/build.py'
  table, line = 'ATTENTIONS = {\n', python_block("'sink':")
  assert line.count('\n') == 1
  build.write_text(build.read_text().replace(table, table + line))

  def run(*argv):
    return subprocess.run([sys.executable, *argv], cwd=tmp_path, capture_output=True, text=True, timeout=180, check=True)

  argv = conftest.train_argv(tmp_path / 'run', text_file, '--config.model.attention=sink')
  assert 'sink_bias' in run(*argv).stderr
  assert 'going on from step 6' in run(*argv, '--config.training.num_steps=8').stderr
  row = json.loads(run('sample.py', f'--workdir={tmp_path}/run', '--prompt=the', '--max_new_tokens=40', '--format=jsonl').stdout)
  assert len(row['tokens']) == 40 or row['finish_reason'] == 'end'

  hook = python_block('def hook(inputs)')
  settings = f'experiment.data.path, experiment.training.num_steps = {str(text_file)!r}, 20\n'
  (tmp_path / 'study.py').write_text(hook.replace('trainer.train(', settings + 'trainer.train('))
  run('study.py')
  assert 'train/sunk' in (tmp_path / 'runs/sink_hook/metrics.jsonl').read_text()


def test_sampling_from_a_script(trained, capsys):
  script = python_block('Generator.load').replace('runs/shakespeare', str(trained)).replace("['ROMEO:', 'JULIET:']", "['the king', 'sea']")
  exec(compile(script, 'README.md', 'exec'), {})
  out = capsys.readouterr().out
  assert out.count('the king') >= 2
  assert sum(out.count(f' {reason}\n') for reason in ('length', 'stop', 'lines', 'end')) == 3
  assert 'prompts: 2, texts: 3, tokens: ' in out


def test_nothing_is_left_to_fill_in():
  for path in (ROOT / 'README.md', *(ROOT / 'configs').glob('*.py')):
    text = path.read_text()
    assert not re.search(r'\b(TABLE|FIGURES|SCORE|TODO|TBD|XXX)\b|_(TABLE|FIGURES)\b', text), path
    assert path.suffix == '.md' or re.search(r'[Ss]core', text), path


def test_the_house_names_every_module():
  tree = re.search(r'## The house\n\n```\n(.*?)```', README, re.DOTALL).group(1)
  modules = [path for path in (ROOT / 'textgen_jax').rglob('*.py') if path.stem != '__init__']
  assert len(modules) > 50
  together = ('data', 'text', 'statistics', 'tools')  # named by what they hold
  assert not [path for path in modules if path.parent.name not in together and not re.search(rf'\b{path.stem}\b', tree)]
