"""Prompts and settings made ready for the samplers, and checked before anything is compiled."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from textgen_jax import errors
from textgen_jax.models import base
from textgen_jax.sampling import constraint, speculative
from textgen_jax.sampling import knobs as knobs_lib
from textgen_jax.sampling import params as params_lib
from textgen_jax.sampling.params import SamplingParams
from textgen_jax.text import base as text_base


class Batch(NamedTuple):
  """Prompts and settings, checked, with what the samplers need to know of them."""

  vocab: knobs_lib.Vocab
  prompts: list[str]
  ids: list[list[int]]  # of the prompts, at least one each
  settings: list[SamplingParams]
  negatives: list[list[int]] | None  # None: nobody uses guidance
  table: constraint.Table | None  # of the constraints; None: there are none
  states: list[int]

  def select(self, kept: Sequence[int]) -> 'Batch':
    """These of them, which may repeat."""
    return self._replace(
      prompts=[self.prompts[i] for i in kept],
      ids=[self.ids[i] for i in kept],
      settings=[self.settings[i] for i in kept],
      negatives=self.negatives and [self.negatives[i] for i in kept],
      states=self.states and [self.states[i] for i in kept],
    )


def prepare(
  model: base.LanguageModel,
  params: Any,
  tokenizer: text_base.Tokenizer,
  prompts: Sequence[str],
  settings: Sequence[SamplingParams],
  draft: speculative.Draft | None = None,
) -> Batch:
  """Encodes prompts and checks them and their settings, one each.

  Raises:
    UserError: a prompt has a character that the tokenizer doesn't know, settings ask for what the vocabulary can't give, or
      the draft doesn't fit.
  """
  if isinstance(prompts, str):
    raise errors.UserError(f'prompts={prompts!r:.60} is one text: give a list')
  if len(prompts) != len(settings):
    raise errors.UserError(f'settings: there are {len(settings)} for {len(prompts)} prompts: give one, or one a prompt')
  encoded = [prompt_ids(tokenizer, prompt, one.begins_document) for prompt, one in zip(prompts, settings, strict=True)]
  vocab = vocab_of(model, params, tokenizer)
  for one in dict.fromkeys(settings):
    _check_ids(one, tokenizer.vocab_size, vocab)
  if draft is not None:
    _check_draft(draft, tokenizer, settings)
  table, states = _constraints(tokenizer, encoded, settings, vocab.size)
  negatives = None
  if any(one.guidance != 1 for one in settings):
    found = {one: prompt_ids(tokenizer, one.negative_prompt, one.begins_document) for one in dict.fromkeys(settings)}
    negatives = [found[one] for one in settings]
  return Batch(vocab, list(prompts), encoded, list(settings), negatives, table, states)


def vocab_of(model: base.LanguageModel, params: Any, tokenizer: text_base.Tokenizer) -> knobs_lib.Vocab:
  """What the sampler needs to know of the ids."""
  leaves, structure = jax.tree.flatten(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params))
  special = tokenizer.special_ids
  return knobs_lib.Vocab(_width(model, structure, tuple(leaves)), special['end_of_text'], special.get('unknown'))


@functools.lru_cache(maxsize=16)
def _width(model: base.LanguageModel, structure: Any, shapes: tuple[jax.ShapeDtypeStruct, ...]) -> int:
  """How many logits the model gives: padding counts. Tracing it takes longer than drawing a few tokens."""

  def logits(params: Any) -> jax.Array:
    hidden_BTD, _ = model.apply({'params': params}, jnp.zeros((1, 1), jnp.int32), cache=model.init_cache(1, 1))
    return model.apply({'params': params}, hidden_BTD, method='unembed')

  return jax.eval_shape(logits, structure.unflatten(shapes)).shape[-1]


def _check_ids(settings: SamplingParams, size: int, vocab: knobs_lib.Vocab) -> None:
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
  if not 1 <= draft.tokens <= params_lib.MAX_DRAFT_TOKENS:
    raise errors.UserError(f'draft: tokens={draft.tokens} is not in [1, {params_lib.MAX_DRAFT_TOKENS}]')
  if any(one.guidance != 1 or one.num_beams for one in settings):
    raise errors.UserError('draft: a draft does not guess under guidance or for beams; leave guidance at 1 and num_beams at 0')


def _constraints(
  tokenizer: text_base.Tokenizer, prompts: Sequence[Sequence[int]], settings: Sequence[SamplingParams], size: int
) -> tuple[constraint.Table | None, list[int]]:
  """The rows' constraints and first states, checked to leave each a text that is short enough; None where no row has one."""
  if not any(map(constraint.wanted, settings)):
    return None, []
  asked = [constraint.Wanted(one.regex, one.choices, one.banned_tokens) for one in settings]
  number = {one: i for i, one in enumerate(dict.fromkeys(filter(constraint.wanted, asked)))}
  constraints = _compile_constraints(tokenizer, tuple(number), size)
  states = [
    constraints.start(number[one], prompt) if one in number else constraint.FREE for one, prompt in zip(asked, prompts, strict=True)
  ]
  for state, one in zip(states, settings, strict=True):
    fewest = constraints.fewest_tokens(state)
    if fewest > one.max_new_tokens:
      raise errors.UserError(f'max_new_tokens={one.max_new_tokens} is below {fewest}, which the shortest text of regex or choices takes')
  return constraints.table, states


# Calls of one script mostly have the same constraints, and a table takes seconds where the vocabulary is large. Two may be 256 MiB.
_compile_constraints = functools.lru_cache(maxsize=2)(constraint.compile_constraints)


def prompt_ids(tokenizer: text_base.Tokenizer, prompt: str, begins_document: bool = False) -> list[int]:
  """The prompt's ids; an empty prompt is what stands before a document.

  Raises:
    UserError: it is no text, has a character that the tokenizer doesn't know, or more than `params.MAX_PROMPT_TOKENS` tokens or
      `params.MAX_PROMPT_CHARACTERS` characters.
  """
  if not isinstance(prompt, str):
    raise errors.UserError(f'prompt {prompt!r:.60} is not a text')
  most = params_lib.MAX_PROMPT_CHARACTERS
  if len(prompt) > most:
    raise errors.UserError(f'prompt {prompt[:60]!r:.60}: its {len(prompt):,} characters are more than {most:,}')
  at = text_base.first_surrogate(prompt)
  if at >= 0:
    raise errors.UserError(f'prompt {prompt!r:.60}: {prompt[at]!r} at offset {at} is not UTF-8 text')
  try:
    found = tokenizer.encode(prompt)
  except errors.UserError as error:
    raise errors.UserError(f'prompt {prompt!r:.60}: {error}') from error
  if len(found) > params_lib.MAX_PROMPT_TOKENS:
    raise errors.UserError(f'prompt {prompt!r:.60}: its {len(found):,} tokens are more than {params_lib.MAX_PROMPT_TOKENS:,}')
  ids = [int(i) for i in found]
  return [tokenizer.special_ids['end_of_text'], *ids] if begins_document or not ids else ids
