"""Generation: prompts in, any number of tokens out, a segment at a time.

  completions = generate(model, params, tokenizer, ['ROMEO:', 'JULIET:'], SamplingParams(temperature=0.8))

A row's text depends on its prompt, settings and sample index alone, not on its batch,
up to the rounding of logits.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from textgen_jax import errors
from textgen_jax.models import base
from textgen_jax.sampling import batch as batch_lib
from textgen_jax.sampling import beam, speculative, stopping
from textgen_jax.sampling import knobs as knobs_lib
from textgen_jax.sampling import sampler as sampler_lib
from textgen_jax.sampling.params import SamplingParams
from textgen_jax.text import base as text_base

ROWS_A_LANE = 4
MAX_LANES = 8
MOST_BYTES_IN_LANES = 32 << 20  # of parameters, which each thread reads: the L3 of the machine measured holds as many


@dataclasses.dataclass
class Completion:
  """What became of one row. Log-probabilities and entropies are in nats, one a token; None where they weren't asked for."""

  prompt: str
  text: str  # generated, without the prompt, and cut where a stop rule has it end
  tokens: list[int]  # generated ids, to the one that completes a stop rule or ends the document
  sample_index: int
  seed: int
  # length | stop (stop, stop_regex or stop_tokens) | lines | sentences | end (of the document) | log_prob (below min_log_prob)
  finish_reason: str
  log_probs: list[float] | None = None  # under the model's own distribution
  drawn_log_probs: list[float] | None = None  # under the one that was drawn from; 0 where the likeliest was taken, None of beams
  entropies: list[float] | None = None  # of the model's own distribution
  alternatives: list[list[tuple[int, float]]] | None = None  # the likeliest tokens at each place, with their log-probabilities
  score: float | None = None  # what best_of and num_beams rank by

  def row(self) -> dict[str, Any]:
    """What JSON tells of it: what was asked for."""
    return {name: value for name, value in vars(self).items() if value is not None}


def generate(
  model: base.LanguageModel,
  params: Any,
  tokenizer: text_base.Tokenizer,
  prompts: Sequence[str],
  settings: SamplingParams | Sequence[SamplingParams],
  transforms: Sequence[knobs_lib.Transform] = (),
  draft: speculative.Draft | None = None,
) -> list[Completion]:
  """Completions of every prompt, `num_samples` each, in the prompts' order; those of `best_of` and `num_beams` the best first.

  Args:
    model: any model of the contract.
    params: its parameters; sharded ones are fine.
    tokenizer: the one that the model was trained with.
    prompts: texts; an empty one stands for the start of a document.
    settings: one for all prompts, or one each.
    transforms: the caller's own, `(logits_BV, history) -> logits_BV`, applied before the temperature. What is compiled is kept by
      the functions themselves: a new lambda each time compiles each time.
    draft: a smaller model of the same tokenizer that guesses ahead: other texts, distributed as without it, in less time.

  Raises:
    UserError: a prompt has a character that the tokenizer doesn't know, or settings ask for what the vocabulary can't give; all before
      anything is compiled, but for fewer texts than `num_samples`, which beams find out.
    NoGoodCheckpoint: a logit isn't a number.
  """
  each = [settings] * len(prompts) if isinstance(settings, SamplingParams) else list(settings)
  batch = batch_lib.prepare(model, params, tokenizer, prompts, each, draft)
  return [one for made in complete(model, params, tokenizer, batch, transforms, draft) for one in made]


def complete(
  model: base.LanguageModel,
  params: Any,
  tokenizer: text_base.Tokenizer,
  batch: batch_lib.Batch,
  transforms: Sequence[knobs_lib.Transform] = (),
  draft: speculative.Draft | None = None,
) -> list[list[Completion]]:
  """What `generate` gives, a list a prompt, for prompts that were checked."""
  made: dict[int, list[Completion]] = {}
  searched = [p for p, one in enumerate(batch.settings) if one.num_beams and one.max_new_tokens]
  for size in dict.fromkeys(batch.settings[p].num_beams for p in searched):
    chosen = [p for p in searched if batch.settings[p].num_beams == size]
    made |= dict(zip(chosen, _search(model, params, tokenizer, batch.select(chosen), transforms), strict=True))
  owners = [(p, i) for p, one in enumerate(batch.settings) if p not in made for i in range(one.rows())]
  uses = knobs_lib.Uses.of([batch.settings[p] for p, _ in owners], batch.vocab, transforms)
  lanes = _lanes(model, params, len(owners))
  parts = [owners[lane::lanes] for lane in range(lanes)]
  drawn = [
    _Rows(model, params, tokenizer, batch.select([p for p, _ in part]), [i for _, i in part], transforms, draft, uses) for part in parts
  ]
  _draw_all(drawn)
  texts = {owner: rows.completion(row) for part, rows in zip(parts, drawn, strict=True) for row, owner in enumerate(part)}
  for p, i in owners:
    made.setdefault(p, []).append(texts[p, i])
  return [_best(made[p], settings) for p, settings in enumerate(batch.settings)]


def _lanes(model: base.LanguageModel, params: Any, rows: int) -> int:
  """In how many threads rows are drawn.

  On CPU one core reads a batch's keys and values, and the others wait: with two threads on two cores 16 rows of a small GPT-2 took 0.59
  of the time. An LSTM has none, and its products take all cores: there two threads took 1.06. Of 4 layers, 256 wide (13 MB of
  parameters), two threads took 0.75 of the time, of 6 layers, 512 wide (75 MB), 1.12. Programs over several devices wait for each other's
  collectives, and would wait for ever in two threads.
  """
  devices = {device for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array) for device in leaf.devices()}
  if jax.default_backend() != 'cpu' or model.window is None or len(devices) > 1:
    return 1
  if sum(leaf.nbytes for leaf in jax.tree.leaves(params)) > MOST_BYTES_IN_LANES:
    return 1
  return max(1, min(os.cpu_count() or 1, rows // ROWS_A_LANE, MAX_LANES))


def _draw_all(lanes: Sequence['_Rows']) -> None:
  if len(lanes) == 1:
    lanes[0].draw()
    return
  with concurrent.futures.ThreadPoolExecutor(len(lanes)) as threads:
    try:
      for done in concurrent.futures.as_completed([threads.submit(rows.draw) for rows in lanes]):
        done.result()
    finally:  # an error, or Ctrl-C: the others end with their segment
      for rows in lanes:
        rows.stop()


def _best(completions: list[Completion], settings: SamplingParams) -> list[Completion]:
  """Those of a prompt that are given, the likeliest first where more were drawn."""
  if not settings.best_of:
    return completions
  return sorted(completions, key=lambda one: one.score or 0.0, reverse=True)[: settings.num_samples]


def stream(
  model: base.LanguageModel,
  params: Any,
  tokenizer: text_base.Tokenizer,
  prompt: str,
  settings: SamplingParams,
  transforms: Sequence[knobs_lib.Transform] = (),
  draft: speculative.Draft | None = None,
) -> Iterator[str]:
  """One completion in pieces, as they are made; together they are what `generate` gives. Checked when called, made when iterated."""
  if settings.num_beams or settings.best_of:
    name = 'num_beams' if settings.num_beams else 'best_of'
    raise errors.UserError(f"{name}={getattr(settings, name)}: the text is known when it has ended, and can't be streamed")
  batch = batch_lib.prepare(model, params, tokenizer, [prompt], [settings], draft)
  return _pieces(_Rows(model, params, tokenizer, batch, [0], transforms, draft))


def _pieces(rows: '_Rows') -> Iterator[str]:
  text, shown = rows.texts[0], 0
  for _ in rows:
    if text.stopped:
      break
    ready = max(shown, text.ready())
    yield text.text[shown:ready]
    shown = ready
  yield text.text[shown:]


class _Rows:
  """Rows of text, made a segment at a time: iterating does the work, and each step stands for one segment."""

  def __init__(
    self,
    model: base.LanguageModel,
    params: Any,
    tokenizer: text_base.Tokenizer,
    batch: batch_lib.Batch,
    sample_indices: Sequence[int],
    transforms: Sequence[knobs_lib.Transform],
    draft: speculative.Draft | None,
    uses: knobs_lib.Uses | None = None,
  ):
    self._stopped = False
    self._batch, self._sample_indices = batch, sample_indices
    self.texts = [stopping.Text(tokenizer, ids, one) for ids, one in zip(batch.ids, batch.settings, strict=True)]
    self._seen = [sampler_lib.Segment([], [], [], [], []) for _ in batch.settings]
    self._sampler = sampler_lib.Sampler(
      model,
      params,
      batch.ids,
      batch.settings,
      sample_indices,
      batch.vocab,
      negatives=batch.negatives,
      table=batch.table,
      states=batch.states,
      transforms=transforms,
      draft=draft,
      uses=uses,
    )

  def draw(self) -> None:
    """All of it."""
    for _ in self:
      if self._stopped:
        return

  def stop(self) -> None:
    """Ends `draw`, which another thread may be in, after its segment."""
    self._stopped = True

  def __iter__(self) -> Iterator[None]:
    for drawn in self._sampler:
      for row, new in drawn.items():
        self._seen[row] += new
        self.texts[row].feed(new.tokens)
        if self.texts[row].stopped:
          self._sampler.finish(row)
      yield
    for text in self.texts:
      text.flush()

  def completion(self, row: int) -> Completion:
    return _completion(self._batch, row, self._sample_indices[row], self.texts[row], self._seen[row])


def _completion(batch: batch_lib.Batch, row: int, sample_index: int, text: stopping.Text, seen: sampler_lib.Segment) -> Completion:
  """A row's text, and of its tokens what was asked for."""
  settings, size = batch.settings[row], len(text.ids)
  reason = finish_reason(text, settings, batch.vocab)
  made = Completion(batch.prompts[row], text.text, text.ids, sample_index, settings.seed, reason)
  if settings.log_probs:
    made.log_probs, made.entropies = seen.log_probs[:size], seen.entropies[:size]
    made.drawn_log_probs = None if settings.num_beams else seen.drawn_log_probs[:size]
  if settings.best_of:
    made.score = sum(seen.log_probs[:size]) / max(size, 1) ** settings.length_penalty
  if settings.alternatives:
    made.alternatives = [others[: settings.alternatives] for others in seen.others[:size]]
  return made


def _search(
  model: base.LanguageModel, params: Any, tokenizer: text_base.Tokenizer, batch: batch_lib.Batch, transforms: Sequence[knobs_lib.Transform]
) -> list[list[Completion]]:
  """The best texts of each prompt; all have the same `num_beams`.

  Raises:
    UserError: there aren't as many texts as are asked for.
  """
  found = beam.search(
    model,
    params,
    batch.ids,
    batch.settings,
    batch.vocab,
    negatives=batch.negatives,
    table=batch.table,
    states=batch.states,
    transforms=transforms,
  )
  made: list[list[Completion]] = []
  for row, (ids, settings, hypotheses) in enumerate(zip(batch.ids, batch.settings, found, strict=True)):
    if len(hypotheses) < settings.num_samples:
      allowed = f'these settings allow {len(hypotheses)} texts after {batch.prompts[row]!r:.60}'
      raise errors.UserError(f'num_samples={settings.num_samples}: {allowed}')
    made.append([])
    for rank, (trace, score) in enumerate(hypotheses[: settings.num_samples]):
      seen = sampler_lib.Segment.of(trace, 0, trace.token.shape[1])
      text = stopping.Text(tokenizer, ids, settings)
      text.feed(seen.tokens)
      text.flush()
      made[-1].append(dataclasses.replace(_completion(batch, row, rank, text, seen), score=score))
  return made


def finish_reason(text: stopping.Text, settings: SamplingParams, vocab: knobs_lib.Vocab) -> str:
  """Why a row has no more tokens."""
  if text.stopped:
    return text.stopped
  if text.ids and text.ids[-1] in vocab.ends(settings):
    return 'stop' if text.ids[-1] in settings.stop_tokens else 'end'
  return 'length' if len(text.ids) >= settings.max_new_tokens else 'log_prob'
