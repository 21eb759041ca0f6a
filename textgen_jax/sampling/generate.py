"""Generation: prompts in, any number of tokens out, a segment at a time.

  completions = generate(model, params, tokenizer, ['ROMEO:', 'JULIET:'], SamplingParams(temperature=0.8))

A row's text depends on its prompt, settings and sample index alone, not on its batch,
up to the rounding of logits.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from textgen_jax import errors
from textgen_jax.models import base
from textgen_jax.sampling import constraint, decode, speculative, stopping
from textgen_jax.sampling import sampler as sampler_lib
from textgen_jax.sampling.params import SamplingParams
from textgen_jax.text import base as text_base


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
  drawn_log_probs: list[float] | None = None  # under the distribution that was drawn from; 0 where the likeliest was taken
  entropies: list[float] | None = None  # of the model's own distribution
  alternatives: list[list[tuple[int, float]]] | None = None  # the likeliest tokens at each place, with their log-probabilities

  def row(self) -> dict[str, Any]:
    """What JSON tells of it: what was asked for."""
    return {name: value for name, value in vars(self).items() if value is not None}


def generate(
  model: base.LanguageModel,
  params: Any,
  tokenizer: text_base.Tokenizer,
  prompts: Sequence[str],
  settings: SamplingParams | Sequence[SamplingParams],
  transforms: Sequence[decode.Transform] = (),
  draft: speculative.Draft | None = None,
) -> list[Completion]:
  """Completions of every prompt, `num_samples` each, in the prompts' order; those of `best_of` the likeliest first.

  Args:
    model: any model of the contract.
    params: its parameters; sharded ones are fine.
    tokenizer: the one that the model was trained with.
    prompts: texts; an empty one stands for the start of a document.
    settings: one for all prompts, or one each.
    transforms: the caller's own, `(logits_BV, history) -> logits_BV`, applied before the temperature.
    draft: a smaller model of the same tokenizer that guesses ahead; it changes how long it takes, and not the texts.

  Raises:
    UserError: a prompt has a character that the tokenizer doesn't know, or settings ask for what the vocabulary can't give.
    NoGoodCheckpoint: a logit isn't a number.
  """
  each = [settings] * len(prompts) if isinstance(settings, SamplingParams) else settings
  encoded = [prompt_ids(tokenizer, prompt, one.begins_document) for prompt, one in zip(prompts, each, strict=True)]
  owners = [(p, i) for p, one in enumerate(each) for i in range(one.rows())]
  indices = [i for _, i in owners]
  rows = _Rows(model, params, tokenizer, [encoded[p] for p, _ in owners], [each[p] for p, _ in owners], indices, transforms, draft)
  for _ in rows:
    pass
  made = [rows.completion(row, prompts[p], i) for row, (p, i) in enumerate(owners)]
  kept, first = [], 0
  for one in each:
    kept += _best(made[first : first + one.rows()], one)
    first += one.rows()
  return kept


def _best(completions: list[Completion], settings: SamplingParams) -> list[Completion]:
  """The likeliest `num_samples`, where more were drawn."""
  if not settings.best_of:
    return completions

  def score(one: Completion) -> float:
    return sum(one.log_probs or []) / max(len(one.tokens), 1) ** settings.length_penalty

  return sorted(completions, key=score, reverse=True)[: settings.num_samples]


def stream(
  model: base.LanguageModel,
  params: Any,
  tokenizer: text_base.Tokenizer,
  prompt: str,
  settings: SamplingParams,
  transforms: Sequence[decode.Transform] = (),
  draft: speculative.Draft | None = None,
) -> Iterator[str]:
  """One completion in pieces, as they are made; together they are what `generate` gives."""
  rows = _Rows(model, params, tokenizer, [prompt_ids(tokenizer, prompt, settings.begins_document)], [settings], [0], transforms, draft)
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
    prompts: Sequence[Sequence[int]],
    settings: Sequence[SamplingParams],
    sample_indices: Sequence[int],
    transforms: Sequence[decode.Transform],
    draft: speculative.Draft | None,
  ):
    self._settings, self._vocab = settings, vocab_of(model, params, tokenizer)
    for one in dict.fromkeys(settings):
      _check_ids(one, tokenizer.vocab_size, self._vocab)
    if draft is not None:
      _check_draft(draft, tokenizer, settings)
    table, states = _constraints(tokenizer, prompts, settings, self._vocab.size)
    negatives = None
    if any(one.guidance != 1 for one in settings):
      encoded = {one: prompt_ids(tokenizer, one.negative_prompt, one.begins_document) for one in dict.fromkeys(settings)}
      negatives = [encoded[one] for one in settings]
    self.texts = [stopping.Text(tokenizer, prompt, one) for prompt, one in zip(prompts, settings, strict=True)]
    self._seen = [sampler_lib.Segment([], [], [], [], []) for _ in settings]
    rows = model, params, prompts, settings, sample_indices, self._vocab
    self._sampler = sampler_lib.Sampler(*rows, negatives=negatives, table=table, states=states, transforms=transforms, draft=draft)

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

  def completion(self, row: int, prompt: str, sample_index: int) -> Completion:
    text, seen, settings = self.texts[row], self._seen[row], self._settings[row]
    reason = finish_reason(text, seen, settings, self._vocab)
    made, size = Completion(prompt, text.text, text.ids, sample_index, settings.seed, reason), len(text.ids)
    if settings.log_probs or settings.best_of:
      made.log_probs, made.drawn_log_probs, made.entropies = seen.log_probs[:size], seen.drawn_log_probs[:size], seen.entropies[:size]
    if settings.alternatives:
      made.alternatives = [others[: settings.alternatives] for others in seen.others[:size]]
    return made


def vocab_of(model: base.LanguageModel, params: Any, tokenizer: text_base.Tokenizer) -> decode.Vocab:
  """What the sampler needs to know of the ids."""

  def logits(params: Any) -> jax.Array:
    hidden_BTD, _ = model.apply({'params': params}, jnp.zeros((1, 1), jnp.int32), cache=model.init_cache(1, 1))
    return model.apply({'params': params}, hidden_BTD, method='unembed')

  special = tokenizer.special_ids
  return decode.Vocab(jax.eval_shape(logits, params).shape[-1], special['end_of_text'], special.get('unknown'))


def _check_ids(settings: SamplingParams, size: int, vocab: decode.Vocab) -> None:
  named = {'logit_bias': [i for i, _ in settings.logit_bias], 'banned_tokens': settings.banned_tokens, 'stop_tokens': settings.stop_tokens}
  for name, ids in named.items():
    wrong = [i for i in ids if i >= size]
    if wrong:
      raise errors.UserError(f'{name}: {wrong[0]} is not an id in the vocabulary [0, {size})')
  if len(set(vocab.banned(settings))) >= size:
    raise errors.UserError(f'banned_tokens: each of the {size} tokens is banned')
  if settings.alternatives > size:
    raise errors.UserError(f'alternatives={settings.alternatives} is above the {size} tokens that there are')


def _check_draft(draft: speculative.Draft, tokenizer: text_base.Tokenizer, settings: Sequence[SamplingParams]) -> None:
  if draft.model.vocab_size != tokenizer.vocab_size:
    raise errors.UserError(f'draft: its vocabulary of {draft.model.vocab_size} is not the model\'s, of {tokenizer.vocab_size}')
  if not 1 <= draft.tokens <= speculative.MAX_TOKENS:
    raise errors.UserError(f'draft: tokens={draft.tokens} is not in [1, {speculative.MAX_TOKENS}]')
  if any(one.guidance != 1 for one in settings):
    raise errors.UserError('draft: a draft does not guess under guidance; leave guidance at 1')


def _constraints(
  tokenizer: text_base.Tokenizer, prompts: Sequence[Sequence[int]], settings: Sequence[SamplingParams], size: int
) -> tuple[constraint.Table | None, list[int]]:
  """The rows' constraints and first states, checked to leave each a text that is short enough; None where no row has one."""
  if not any(map(constraint.wanted, settings)):
    return None, []
  constraints = constraint.compile_constraints(tokenizer, [(one.regex, one.choices) for one in settings], size)
  states = [constraints.start(i, prompt) for i, prompt in enumerate(prompts)]
  for state, one in zip(states, settings, strict=True):
    fewest = constraints.fewest_tokens(state)
    if fewest > one.max_new_tokens:
      raise errors.UserError(f'max_new_tokens={one.max_new_tokens} is below {fewest}, which the shortest text of regex or choices takes')
  return constraints.table, states


def finish_reason(text: stopping.Text, seen: sampler_lib.Segment, settings: SamplingParams, vocab: decode.Vocab) -> str:
  """Why a row has no more tokens."""
  if text.stopped:
    return text.stopped
  if text.ids and text.ids[-1] in vocab.ends(settings):
    return 'stop' if text.ids[-1] in settings.stop_tokens else 'end'
  return 'log_prob' if sum(seen.log_probs) < settings.min_log_prob else 'length'


def prompt_ids(tokenizer: text_base.Tokenizer, prompt: str, begins_document: bool = False) -> list[int]:
  """The prompt's ids; an empty prompt is what stands before a document."""
  try:
    ids = [int(i) for i in tokenizer.encode(prompt)]
  except errors.UserError as error:
    raise errors.UserError(f'prompt {prompt!r:.60}: {error}') from error
  return [tokenizer.special_ids['end_of_text'], *ids] if begins_document or not ids else ids
