import dataclasses
import json
import math
import os
import signal
import threading

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from textgen_jax import assembly, errors, trainer, trees, workdir
from textgen_jax import experiment as experiment_lib
from textgen_jax.data import corpora, prepare
from textgen_jax.models import lstm, transformer
from textgen_jax.sampling import generate
from textgen_jax.text import base
from textgen_jax.tools import evaluate as evaluate_tool
from textgen_jax.training import evaluate, metrics, optimizer

TEXT = 'She sells sea shells by the sea shore, and the shells she sells are sea shells. ' * 24
MODELS = ('transformer', 'lstm')


@pytest.fixture(scope='module', autouse=True)
def surroundings(tmp_path_factory, quickly):
  """A cache of our own."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('TEXTGEN_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
    yield


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp('text') / 'text.txt'
  path.write_text(TEXT)
  return path


@pytest.fixture
def make(text):
  def make(kind='lstm', rate=1e-2, schedule_steps=0, init_from='', dim=16, tokenizer='char', **training):
    if kind == 'transformer':
      model = transformer.TransformerConfig(dim=dim, num_layers=1, num_heads=2, dropout=0.1)
    else:
      model = lstm.LSTMConfig(dim=dim, num_layers=1, dropout=0.1)
    settings = {
      'num_steps': 8,
      'batch_size': 4,
      'sequence_length': 8,
      'windows': 'contiguous' if kind == 'lstm' else 'random',
      'log_every_steps': 1,
      'eval_every_steps': 0,
      'checkpoint_every_steps': 0,
      'sample_tokens': 0,
      'eval_batch_size': 8,
    }
    return experiment_lib.Experiment(
      init_from=str(init_from),
      data=corpora.DataConfig(path=str(text)),
      tokenizer=base.TokenizerConfig(kind=tokenizer),
      model=model,
      optimizer=optimizer.OptimizerConfig(peak_lr=rate, final_lr=rate / 10, warmup_steps=2, schedule_steps=schedule_steps),
      training=experiment_lib.TrainingConfig(**(settings | training)),
    )

  return make


def lines(directory):
  return [json.loads(line) for line in (directory / 'metrics.jsonl').read_text().splitlines()]


def column(directory, name):
  return {line['step']: line[name] for line in lines(directory) if name in line}


def steps(directory):
  return sorted(int(path.name) for path in (directory / 'checkpoints').iterdir() if path.name.isdecimal())


def stored(directory, step):
  """All arrays of a checkpoint: params, moments, counts, carry."""
  read = ocp.StandardCheckpointer().restore
  here = directory.absolute() / 'checkpoints' / str(step)
  return {item: read(here / item) for item in ('params', 'state')}


def assert_same_end(a, b, step):
  for (name, x), (_, y) in zip(*(trees.named_leaves(stored(one, step)) for one in (a, b)), strict=True):
    np.testing.assert_array_equal(x, y, err_msg=name)


def snapshot(directory):
  return {path: (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else None for path in directory.rglob('*')}


@pytest.mark.parametrize('kind', MODELS)
def test_scores_stay_in_float32_where_training_rounds(kind, make, tmp_path):
  """One step at a rate that changes nothing: the losses on val are of the same parameters."""
  found = {}
  for dtype in ('float32', 'bfloat16'):
    trainer.train(make(kind, rate=1e-30, num_steps=1, eval_every_steps=1, product_dtype=dtype), tmp_path / dtype)
    found[dtype] = {name: value for line in lines(tmp_path / dtype) for name, value in line.items()}
  assert found['float32']['val/loss'] == found['bfloat16']['val/loss']
  assert found['float32']['train/loss'] != found['bfloat16']['train/loss']


@pytest.mark.parametrize('kind', MODELS)
def test_looking_at_a_run_does_not_change_it(kind, make, tmp_path):
  quiet, watched = tmp_path / 'quiet', tmp_path / 'watched'
  trainer.train(make(kind, num_steps=12, log_every_steps=100), quiet)
  busy = {'eval_every_steps': 3, 'sample_every_steps': 2, 'sample_tokens': 3, 'checkpoint_every_steps': 5, 'eval_max_tokens': 50}
  trainer.train(make(kind, num_steps=12, **busy), watched)
  assert_same_end(quiet, watched, 12)
  assert len(column(watched, 'val_prefix/loss')) == 4
  assert list(column(watched, 'val/loss')) == [12]
  assert list(column(quiet, 'train/loss')) == [12]
  assert column(quiet, 'train/loss')[12] == column(watched, 'train/loss')[12]  # that step's own


@pytest.mark.parametrize('kind', MODELS)
def test_learns_a_text_and_writes_what_scripts_read(kind, make, tmp_path, text):
  def hook(inputs):
    return jnp.zeros(()), {'norm': (jnp.square(inputs.hidden_BTD).sum(), jnp.asarray(float(inputs.nll_BT.size)))}

  score = trainer.train(make(kind, rate=3e-2, num_steps=80, log_every_steps=10, eval_every_steps=40), tmp_path, hook)
  for name in ('loss', 'grad_norm', 'learning_rate', 'tokens_per_s', 'norm'):
    found = column(tmp_path, f'train/{name}')
    assert list(found) == list(range(10, 81, 10)), name
    assert all(math.isfinite(value) and value > 0 for value in found.values()), name
  # The last of 80 updates stands one short of the schedule's end; the cosine is flat there.
  np.testing.assert_allclose(column(tmp_path, 'train/learning_rate')[80], 3e-3, rtol=1e-2)
  val = {name: column(tmp_path, f'val/{name}') for name in ('loss', 'bits_per_byte', 'perplexity')}
  assert {tuple(found) for found in val.values()} == {(40, 80)}
  assert val['loss'][80] == score.loss_nats
  np.testing.assert_allclose(val['perplexity'][80], math.exp(score.loss_nats))
  # Characters of one byte: a token is a byte, but for the one that ends the text.
  num_bytes = len(TEXT) - int(0.9 * len(TEXT))
  assert (score.tokens, score.summary()['bytes']) == (num_bytes + 1, num_bytes)
  np.testing.assert_allclose(val['bits_per_byte'][80], score.loss_nats / math.log(2) * (num_bytes + 1) / num_bytes)
  uniform = math.log(len(set(TEXT)) + 1)
  assert score.loss_nats < val['loss'][40] < uniform
  assert score.loss_nats < 0.7 * uniform
  assert column(tmp_path, 'train/loss')[80] < 0.7 * uniform
  assert (tmp_path / 'config.json').is_file()
  assert (tmp_path / 'tokenizer' / 'tokenizer.json').is_file()
  assert list(tmp_path.glob('events.out.tfevents.*'))


@pytest.mark.parametrize('kind', MODELS)
def test_more_steps_go_on_as_if_asked_for_at_once(kind, make, tmp_path, capfd):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  trainer.train(make(kind, num_steps=14, schedule_steps=20), whole)
  trainer.train(make(kind, num_steps=5, schedule_steps=20), parts)
  before = lines(parts)
  capfd.readouterr()
  trainer.train(make(kind, num_steps=14, schedule_steps=0, checkpoint_every_steps=3), parts)  # 0 keeps the horizon that was
  told = capfd.readouterr().err
  assert 'going on from step 5' in told
  assert 'changed on resume: training.num_steps: 5 -> 14' in told
  assert_same_end(whole, parts, 14)
  assert lines(parts)[: len(before)] == before
  for name in ('train/loss', 'train/grad_norm', 'train/learning_rate'):
    assert column(parts, name) == column(whole, name)


def test_a_run_goes_on_without_the_loop_over_its_layers(make, tmp_path, capfd):
  def experiment(num_steps, **changes):
    given = make('transformer', num_steps=num_steps, schedule_steps=6)
    given.model = dataclasses.replace(given.model, num_layers=2, dropout=0.0, **changes)
    return given

  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  trainer.train(experiment(6), whole)
  trainer.train(experiment(3, scan_layers=True, remat='full'), parts)
  trainer.train(experiment(6), parts)
  told = capfd.readouterr().err
  assert "changed on resume: model.remat: 'full' -> 'none'" in told
  assert 'changed on resume: model.scan_layers: True -> False' in told
  for name in ('train/loss', 'train/grad_norm'):
    np.testing.assert_allclose(list(column(parts, name).values()), list(column(whole, name).values()), rtol=1e-5)


def test_a_finished_run_is_only_scored_again(make, tmp_path, capfd):
  first = trainer.train(make(), tmp_path)
  before = snapshot(tmp_path / 'checkpoints')
  np.testing.assert_array_equal(trainer.train(make(), tmp_path).nll_sums, first.nll_sums)
  assert 'has trained 8 steps already' in capfd.readouterr().err
  assert snapshot(tmp_path / 'checkpoints') == before
  assert list(column(tmp_path, 'train/loss')) == list(range(1, 9))


def test_a_change_that_makes_another_run_is_refused(make, tmp_path):
  trainer.train(make(), tmp_path / 'run')
  before = snapshot(tmp_path)
  given = make(rate=2e-2, dim=32, num_steps=20, log_every_steps=3)
  with pytest.raises(errors.UserError) as caught:
    trainer.train(given, tmp_path / 'run')
  message = str(caught.value)
  for line in ('model.dim: 16 -> 32', 'optimizer.peak_lr: 0.01 -> 0.02', 'optimizer.final_lr: 0.001 -> 0.002'):
    assert line in message
  assert 'num_steps' not in message  # what may change isn't blamed
  assert 'log_every_steps' not in message
  with pytest.raises(errors.UserError, match='seed: 0 -> 1'):
    trainer.train(dataclasses.replace(make(), seed=1), tmp_path / 'run')
  assert snapshot(tmp_path) == before


def test_another_text_is_refused(make, tmp_path):
  trainer.train(make(), tmp_path / 'run')
  (tmp_path / 'other.txt').write_text(TEXT.replace('shore', 'store'))
  (tmp_path / 'same.txt').write_text(TEXT)
  before = snapshot(tmp_path)
  given = make(num_steps=9)
  given.data.path = str(tmp_path / 'other.txt')
  with pytest.raises(errors.UserError, match='was trained on other text: data'):
    trainer.train(given, tmp_path / 'run')
  assert snapshot(tmp_path) == before
  given.data.path = str(tmp_path / 'same.txt')  # the same text elsewhere is the same text
  trainer.train(given, tmp_path / 'run')
  assert steps(tmp_path / 'run')[-1] == 9


@pytest.mark.parametrize('kind', MODELS)
def test_init_from_takes_the_params_alone(kind, make, tmp_path):
  source, target = tmp_path / 'source', tmp_path / 'target'
  trainer.train(make(kind, num_steps=6), source)
  # At a rate of 0 the params stay what they were at the start.
  trainer.train(make(kind, rate=0.0, num_steps=3, init_from=source), target)
  theirs, ours = stored(source, 6), stored(target, 3)
  for (name, x), (_, y) in zip(*(trees.named_leaves(one['params']) for one in (theirs, ours)), strict=True):
    np.testing.assert_array_equal(x, y, err_msg=name)
  assert int(ours['state']['step']) == int(ours['state']['updates']) == 3
  counts = [int(x) for name, x in trees.named_leaves(ours['state']['opt_state']) if name.endswith('count')]
  assert counts
  assert set(counts) == {3}
  assert list(column(target, 'train/loss')) == [1, 2, 3]


@pytest.mark.parametrize('averaging', [{'average_decay': 0.9}, {'kind': 'schedule_free'}], ids=['moving', 'schedule_free'])
def test_an_average_is_saved_scored_and_gone_on_from(averaging, make, tmp_path):
  def given(**changes):
    experiment = make('transformer', schedule_steps=6, **changes)
    experiment.optimizer = dataclasses.replace(experiment.optimizer, **averaging)
    return experiment

  trainer.train(given(num_steps=6), tmp_path / 'whole')
  trainer.train(given(num_steps=3), tmp_path / 'parts')
  trainer.train(given(num_steps=6), tmp_path / 'parts')
  assert_same_end(tmp_path / 'whole', tmp_path / 'parts', 6)
  kept = stored(tmp_path / 'whole', 6)
  assert any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (kept['params'], kept['state']['trained'])), strict=True))
  for x, y in zip(*map(jax.tree.leaves, (kept['params'], workdir.load(tmp_path / 'whole').params)), strict=True):
    np.testing.assert_array_equal(x, y)
  trainer.train(given(num_steps=2, init_from=tmp_path / 'whole'), tmp_path / 'warm')  # donates both copies
  assert list(column(tmp_path / 'warm', 'train/loss')) == [1, 2]


@pytest.mark.parametrize('kind', MODELS)
def test_masked_documents_are_learned_and_scored_apart(kind, make, tmp_path):
  (tmp_path / 'texts.jsonl').write_text(''.join(json.dumps({'text': TEXT[n : n + 9 + n % 7]}) + '\n' for n in range(150)))
  scores = {}
  for masked in (False, True):
    given = make(kind, num_steps=3, mask_documents=masked)
    given.data.path = str(tmp_path / 'texts.jsonl')
    scores[masked] = trainer.train(given, tmp_path / f'{masked}')
    np.testing.assert_array_equal(trainer.train(given, tmp_path / f'{masked}').nll_sums, scores[masked].nll_sums)
    # The tool reads as training did, and every document's tokens are those of the text and its end.
    trained = workdir.load(tmp_path / f'{masked}', 'latest')
    reading = evaluate_tool.reading(trained, stride=0 if kind == 'lstm' else 8)
    assert reading.end_of_text == (trained.tokenizer.special_ids['end_of_text'] if masked else None)
    val = prepare.prepare(given.data, given.tokenizer).splits['val']
    again = evaluate.evaluate(trained.model, trained.params, val, reading, batch_size=5)
    np.testing.assert_allclose(again.nll_sums, scores[masked].nll_sums, rtol=1e-5)
    assert (again.documents['tokens'] == again.documents['characters'] + 1).all()
  assert column(tmp_path / 'False', 'train/loss')[3] != column(tmp_path / 'True', 'train/loss')[3]
  with pytest.raises(errors.UserError, match=r'training\.mask_documents: False -> True'):
    trainer.train(given, tmp_path / 'False')


@pytest.mark.parametrize('kind', ['byte', 'word', 'sentencepiece'])
def test_every_tokenizer_trains_stops_and_goes_on(kind, make, tmp_path):
  given = make(tokenizer=kind, num_steps=2, schedule_steps=4)
  given.tokenizer.vocab_size = 290 if kind == 'sentencepiece' else 0
  score = trainer.train(given, tmp_path)
  val = TEXT[int(0.9 * len(TEXT)) :]
  trained = workdir.load(tmp_path, 'latest')
  assert score.tokens == len(trained.tokenizer.encode(val)) + 1
  assert score.summary()['bytes'] == len(val)
  # After two steps the model is not far from uniform; what has no id costs 8 bits for each of its bytes and one more.
  bits = score.tokens * math.log2(trained.tokenizer.vocab_size) + sum(8 * (len(one) + 1) for one in trained.tokenizer.unknowns(val))
  assert 0.3 * bits < score.bits_per_byte * len(val) < 1.1 * bits
  given.training.num_steps = 4
  trainer.train(given, tmp_path)
  assert list(column(tmp_path, 'train/loss')) == [1, 2, 3, 4]


def test_a_word_vocabulary_that_standardizes_has_no_bits_per_byte(make, tmp_path, capfd):
  given = make(tokenizer='word', num_steps=1)
  given.tokenizer.standardize = True
  assert trainer.train(given, tmp_path).bits_per_byte is None
  assert column(tmp_path, 'val/bits_per_byte') == {1: None}
  assert 'no bits per byte' in capfd.readouterr().err


def test_another_tokenizer_is_refused(make, tmp_path):
  """The same settings may make another one, where a library or a file has changed: the checkpoint remembers which it was."""
  trainer.train(make(), tmp_path / 'run')
  about = workdir.newest(tmp_path / 'run')[1]
  assert about['tokenizer_sha256'] == workdir.load(tmp_path / 'run').tokenizer.fingerprint()
  conftest.change_about(tmp_path / 'run', tokenizer_sha256='0' * 64)
  before = snapshot(tmp_path)
  with pytest.raises(errors.UserError, match="its checkpoint's tokenizer has SHA-256 000000000000, and this text's"):
    trainer.train(make(num_steps=9), tmp_path / 'run')
  with pytest.raises(errors.UserError, match=r'tokenizer has SHA-256 \w+, .* 000000000000'):
    workdir.load(tmp_path / 'run')
  assert snapshot(tmp_path) == before


def test_init_from_what_does_not_fit(make, tmp_path):
  source, target = tmp_path / 'source', tmp_path / 'target'
  trainer.train(make(num_steps=2), source)
  for given, complaint in (
    (make(dim=32, init_from=source), r'has other parameters: embed/embedding \(\d+, 16\) -> \(\d+, 32\)'),
    (make(tokenizer='byte', init_from=source), 'another tokenizer'),
    (make(init_from=tmp_path / 'nothing'), 'no checkpoint was ever written there'),
  ):
    with pytest.raises(errors.UserError, match=complaint):
      trainer.train(given, target)
  assert not target.exists()


def test_a_prefix_is_scored_on_the_way_and_the_whole_at_the_end(make, tmp_path, capfd):
  score = trainer.train(make('transformer', num_steps=6, eval_every_steps=2, eval_max_tokens=40), tmp_path)
  whole = len(TEXT) - int(0.9 * len(TEXT)) + 1  # the end of the text is predicted too
  assert score.tokens == whole
  found = [(line['step'], line['val_prefix/tokens']) for line in lines(tmp_path) if 'val_prefix/tokens' in line]
  assert found == [(2, 39), (4, 39), (6, 39)]
  assert column(tmp_path, 'val/tokens') == {6: whole}
  told = [line for line in capfd.readouterr().err.splitlines() if 'val loss' in line]
  assert ['whole' in line for line in told] == [False, False, False, True]


def test_the_best_and_the_latest_are_kept(make, tmp_path):
  # At so high a rate the loss soon rises.
  for num_steps in (4, 6):  # what was best before a restart is remembered
    trainer.train(make('lstm', rate=20.0, num_steps=num_steps, eval_every_steps=1, schedule_steps=1000, keep_checkpoints=1), tmp_path)
    losses = column(tmp_path, 'val/loss')
    best = min(losses, key=losses.get)
    assert best < num_steps
    assert steps(tmp_path) == [best, num_steps]
    assert workdir.load(tmp_path).step == best
    assert workdir.load(tmp_path, 'latest').step == num_steps


@pytest.mark.parametrize(
  ('settings', 'raised_by'),
  [({'log_every_steps': 1}, 10), ({'log_every_steps': 100}, 10), ({'max_skipped_steps': 3}, 3), ({'num_steps': 5}, 5)],
)
def test_training_that_never_updates_has_diverged(settings, raised_by, make, tmp_path):
  def hook(inputs):
    return jnp.nan * inputs.hidden_BTD.sum(), {'broken': (jnp.asarray(jnp.inf), jnp.ones(()))}

  with pytest.raises(errors.Diverged, match=rf'^steps 1 to {raised_by}: no update was applied; .* loss hook is not$') as caught:
    trainer.train(make(**({'num_steps': 30, 'checkpoint_every_steps': raised_by} | settings)), tmp_path, hook)
  assert caught.value.exit_code == 3
  assert len(str(caught.value)) < 300
  assert all(value is None for value in column(tmp_path, 'train/broken').values())
  assert steps(tmp_path) == []


def test_a_few_bad_steps_are_skipped_told_and_gone_past(make, tmp_path, capfd):
  def hook(inputs):
    bad = (inputs.batch.tokens_BT.sum() % 3) == 0
    return jnp.where(bad, jnp.nan, 0.0), {}

  trainer.train(make(num_steps=20), tmp_path, hook)
  skipped = column(tmp_path, 'train/skipped_steps')
  assert 0 < skipped[20] < 20
  final = stored(tmp_path, 20)
  assert int(final['state']['step']) == 20
  assert int(final['state']['updates']) == 20 - skipped[20]
  assert all(np.isfinite(x).all() for _, x in trees.named_leaves(final))
  assert f'{skipped[20]} steps so far were skipped' in capfd.readouterr().err
  # The schedule waits for a skipped step. (The warm-up's last rate is also the first after it.)
  rates = list(column(tmp_path, 'train/learning_rate').values())
  bad = np.diff([0, *skipped.values()]).astype(bool)
  falling = [n for n in range(18) if rates[n] < 9.99e-3]
  assert {bad[n] for n in falling} == {True, False}
  assert all((rates[n] == rates[n + 1]) == bad[n] for n in falling)


@pytest.mark.parametrize('profile_steps', ['2:3', '2:50'])
def test_profile_steps_write_a_trace(profile_steps, make, tmp_path):
  trainer.train(make(num_steps=4, profile_steps=profile_steps), tmp_path)
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


def test_a_profile_may_span_a_restart(make, tmp_path):
  trainer.train(make(num_steps=3, schedule_steps=6), tmp_path)
  trainer.train(make(num_steps=6, schedule_steps=6, profile_steps='2:5'), tmp_path)
  assert steps(tmp_path)[-1] == 6
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


@pytest.mark.parametrize('during', ['sample', 'score'])
def test_a_signal_while_all_is_saved_leaves_at_once_and_loses_nothing(during, make, tmp_path, monkeypatch):
  owner, name = {'sample': (generate, 'generate'), 'score': (evaluate, 'evaluate')}[during]
  original, calls = getattr(owner, name), []

  def interrupted(*args, **kwargs):
    calls.append(None)
    signal.raise_signal(signal.SIGINT)
    return original(*args, **kwargs)

  given = make(num_steps=6, eval_every_steps=3, sample_every_steps=3, sample_tokens=2)
  monkeypatch.setattr(owner, name, interrupted)
  with pytest.raises(KeyboardInterrupt):
    trainer.train(given, tmp_path / 'stopped')
  assert len(calls) == 1
  monkeypatch.setattr(owner, name, original)
  assert steps(tmp_path / 'stopped') == [3]
  trainer.train(given, tmp_path / 'stopped')
  trainer.train(given, tmp_path / 'whole')
  assert_same_end(tmp_path / 'stopped', tmp_path / 'whole', 6)
  assert column(tmp_path / 'stopped', 'val/loss') == column(tmp_path / 'whole', 'val/loss')
  assert workdir.load(tmp_path / 'stopped').step == workdir.load(tmp_path / 'whole').step


def test_a_file_as_workdir_and_too_little_text(make, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(errors.UserError, match='is a file'):
    trainer.train(make(), tmp_path / 'file')
  (tmp_path / 'short.txt').write_text('abc' * 20)
  given = make()
  given.data.path = str(tmp_path / 'short.txt')
  with pytest.raises(errors.UserError, match=r'the split has \d+ tokens'):
    trainer.train(given, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_a_run_that_is_stopped_where_it_evaluates_lacks_nothing(make, tmp_path):
  """The score is in the log and with the checkpoint, so that the best stays the best."""
  write = metrics.Writer.write

  def write_and_stop(self, done, values):
    write(self, done, values)
    if done == 1 and 'train/loss' in values:
      signal.raise_signal(signal.SIGINT)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(metrics.Writer, 'write', write_and_stop)
    with pytest.raises(errors.Stopped, match='SIGINT: step 1 is saved'):
      trainer.train(make('transformer', num_steps=3, eval_every_steps=1, log_every_steps=1), tmp_path)
  assert list(column(tmp_path, 'val/loss')) == []  # not while someone waits
  assert workdir.load(tmp_path).step == 1
  trainer.train(make('transformer', num_steps=3, eval_every_steps=1), tmp_path)
  assert list(column(tmp_path, 'val/loss')) == [1, 2, 3]


def test_the_checkpoint_guards_its_settings_not_the_file_beside_it(make, tmp_path):
  trainer.train(make('transformer', num_steps=2), tmp_path)
  (tmp_path / 'config.json').unlink()
  changed = make('transformer', num_steps=4)
  changed.optimizer.peak_lr = 0.5
  with pytest.raises(errors.UserError, match=r'optimizer\.peak_lr: .* -> 0\.5'):
    trainer.train(changed, tmp_path)
  assert not (tmp_path / 'config.json').exists()


@pytest.mark.parametrize(
  ('result', 'match'),
  [
    ((jnp.zeros(3), {}), r'shape \(3,\), not a scalar'),
    ((jnp.zeros(()), {'loss': (1.0, 1.0)}), "'loss' bears a name of the step's own"),
    ((jnp.zeros(()), {'norm': 3.0}), "'norm' is not a pair of scalars"),
    ((jnp.zeros(()), {'norm': jnp.zeros(2)}), "'norm' is not a pair of scalars"),
  ],
)
def test_a_hook_that_gives_what_cannot_be_summed(make, tmp_path, result, match):
  with pytest.raises(errors.UserError, match=match):
    trainer.train(make('transformer', num_steps=2), tmp_path, lambda inputs: result)


@pytest.mark.parametrize('minutes', [1e-9, 1e-3])
def test_a_time_limit_saves_and_asks_to_be_started_again(minutes, make, tmp_path):
  given = make(num_steps=200, schedule_steps=200)
  given.time_limit_minutes = minutes
  with pytest.raises(errors.TimeIsUp, match=rf'time_limit_minutes={minutes} have passed: step \d+ is saved') as caught:
    trainer.train(given, tmp_path)
  assert caught.value.exit_code == 75
  (reached,) = steps(tmp_path)
  assert list(column(tmp_path, 'train/loss')) == list(range(1, reached + 1))
  given.time_limit_minutes, given.training.num_steps = 0.0, reached + 1
  trainer.train(given, tmp_path)
  assert steps(tmp_path)[-1] == reached + 1


def test_a_second_trainer_is_told_who_trains_there(make, tmp_path):
  trainer.train(make(num_steps=2), tmp_path)
  with workdir.locked(tmp_path), pytest.raises(errors.UserError, match=rf'is being trained by process {os.getpid()} on '):
    trainer.train(make(num_steps=4), tmp_path)
  assert steps(tmp_path) == [2]
  trainer.train(make(num_steps=4), tmp_path)
  assert not (tmp_path / 'lock').exists()


def test_a_damaged_step_is_set_aside_and_taken_anew(make, tmp_path, capfd):
  given = make(num_steps=6, checkpoint_every_steps=2, keep_checkpoints=3)
  trainer.train(given, tmp_path / 'damaged')
  trainer.train(given, tmp_path / 'whole')
  checkpoints_of = tmp_path / 'damaged' / 'checkpoints'
  victim = max((path for path in (checkpoints_of / '6').rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)
  data = bytearray(victim.read_bytes())
  data[len(data) // 2] ^= 1
  victim.write_bytes(data)
  (checkpoints_of / '9').mkdir()
  (checkpoints_of / '99').symlink_to('4')
  capfd.readouterr()
  trainer.train(given, tmp_path / 'damaged')
  told = capfd.readouterr().err
  assert f'checkpoints/6 is skipped: {victim.relative_to(checkpoints_of / "6")} is damaged' in told
  assert 'checkpoints/9 is skipped: it has no manifest.json' in told
  assert 'going on from step 4' in told
  assert steps(tmp_path / 'damaged') == [2, 4, 6]
  assert sorted(path.name for path in checkpoints_of.iterdir() if '.' in path.name) == ['6.damaged', '9.damaged', '99.damaged']
  assert_same_end(tmp_path / 'damaged', tmp_path / 'whole', 6)
  assert column(tmp_path / 'damaged', 'train/loss') == column(tmp_path / 'whole', 'train/loss')


def test_no_good_step_is_never_a_start_from_zero(make, tmp_path):
  trainer.train(make(num_steps=2), tmp_path)
  (tmp_path / 'checkpoints' / '2' / 'manifest.json').unlink()
  before = snapshot(tmp_path)
  with pytest.raises(errors.NoGoodCheckpoint, match='none of its 1 checkpoints is good; 2: it has no manifest') as caught:
    trainer.train(make(num_steps=4), tmp_path)
  assert caught.value.exit_code == 4
  assert snapshot(tmp_path) == before


def recorded_spans(patch):
  """The places of the data that each dispatch is about to train on."""
  spans, original = [], assembly.Parts.inputs

  def inputs(self, places):
    spans.append(list(places))
    return original(self, places)

  patch.setattr(assembly.Parts, 'inputs', inputs)
  return spans


def test_several_steps_in_a_dispatch_are_the_same_steps(make, tmp_path, monkeypatch, capfd):
  """What is due after a step is done after it; to the bit the same steps however dispatches are cut; those of single steps nearly."""
  quiet, busy, single = (tmp_path / name for name in ('quiet', 'busy', 'single'))
  same = {'kind': 'transformer', 'num_steps': 13, 'schedule_steps': 13}
  trainer.train(make(**same, steps_per_dispatch=4, log_every_steps=5), quiet)
  trainer.train(make(**same | {'num_steps': 2}, steps_per_dispatch=4), busy)
  spans = recorded_spans(monkeypatch)
  due = {'eval_every_steps': 5, 'checkpoint_every_steps': 3, 'keep_checkpoints': 9, 'profile_steps': '8:8'}
  trainer.train(make(**same, **due, steps_per_dispatch=4), busy)
  assert spans == [[0], [2], [3, 4], [5], [6], [7], [8], [9], [10, 11], [12]]  # the first one is compiled for
  assert steps(busy) == [2, 3, 5, 6, 9, 10, 12, 13]
  assert_same_end(quiet, busy, 13)
  assert list(column(busy, 'val/loss')) == [2, 5, 10, 13]
  capfd.readouterr()
  trainer.train(make(**same | {'num_steps': 2}), single)
  trainer.train(make(**same | {'num_steps': 2}, steps_per_dispatch=4), single)
  assert 'changed on resume: training.steps_per_dispatch: 1 -> 4' in capfd.readouterr().err
  for name in ('train/loss', 'train/grad_norm', 'train/learning_rate', 'train/skipped_steps'):
    found = column(busy, name)
    assert list(found) == list(range(1, 14))
    assert column(quiet, name) == {step: found[step] for step in (5, 10, 13)}
    np.testing.assert_allclose([found[1], found[2]], list(column(single, name).values()), rtol=1e-5)
  assert all(0 < value < math.inf for value in column(busy, 'train/tokens_per_s').values())


def test_a_signal_ends_a_run_after_its_dispatches(make, tmp_path, monkeypatch):
  write = metrics.Writer.write

  def write_and_stop(self, done, values):
    write(self, done, values)
    if done == 2:
      signal.raise_signal(signal.SIGTERM)

  given = make('transformer', num_steps=16, steps_per_dispatch=3)
  with monkeypatch.context() as patch:
    patch.setattr(metrics.Writer, 'write', write_and_stop)
    with pytest.raises(errors.Stopped, match='SIGTERM: step 6 is saved'):  # the second dispatch is on its way when the first is read
      trainer.train(given, tmp_path / 'stopped')
  assert steps(tmp_path / 'stopped') == [6]
  assert list(column(tmp_path / 'stopped', 'train/loss')) == list(range(1, 7))
  trainer.train(given, tmp_path / 'stopped')
  trainer.train(given, tmp_path / 'whole')
  assert_same_end(tmp_path / 'stopped', tmp_path / 'whole', 16)
  assert column(tmp_path / 'stopped', 'train/loss') == column(tmp_path / 'whole', 'train/loss')


@pytest.mark.parametrize('steps_per_dispatch', [1, 2])
def test_the_device_never_waits_for_the_host(steps_per_dispatch, make, tmp_path, monkeypatch):
  """Batches lie on the device before their turn, put there by another thread, and a dispatch goes out before the last one is read."""
  events, threads = [], set()
  inputs, ready, read = assembly.Parts.inputs, trainer._Trainer.compiled, trainer._Trainer.read

  def inputs_told(self, places):
    if threading.current_thread() is not threading.main_thread():
      threads.add(threading.current_thread().name.partition('_')[0])
      events.append(('made', places[-1] + 1))
    return inputs(self, places)

  def compiled_told(self):
    compiled = ready(self)

    def take(train_state, *given):
      assert all(isinstance(x, jax.Array) and x.committed for x in jax.tree.leaves(given))
      with jax.transfer_guard('disallow'):
        train_state, sums = compiled(train_state, *given)
      events.append(('dispatched', sum(event == 'dispatched' for event, _ in events) * steps_per_dispatch + steps_per_dispatch))
      return train_state, sums

    return take

  def read_told(self, span, *args):
    events.append(('read', span[-1]))
    return read(self, span, *args)

  monkeypatch.setattr(assembly.Parts, 'inputs', inputs_told)
  monkeypatch.setattr(trainer._Trainer, 'compiled', compiled_told)
  monkeypatch.setattr(trainer._Trainer, 'read', read_told)
  trainer.train(make(num_steps=12, steps_per_dispatch=steps_per_dispatch), tmp_path)
  assert threads == {'prefetch'}
  dispatches = range(steps_per_dispatch, 13, steps_per_dispatch)
  assert [event for event in events if event[0] == 'made'] == [('made', done) for done in dispatches]
  expected = [('dispatched', steps_per_dispatch)]
  for done in dispatches[1:]:
    expected += [('dispatched', done), ('read', done - steps_per_dispatch)]
  assert [event for event in events if event[0] != 'made'] == [*expected, ('read', 12)]
