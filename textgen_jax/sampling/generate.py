"""Generation: prompts in, any number of tokens out, a segment at a time.

  completions = generate(model, params, tokenizer, ['ROMEO:', 'JULIET:'], SamplingParams(temperature=0.8))

A row's text depends on its prompt, settings and sample index alone, not on its batch,
up to the rounding of logits.
"""

import bisect
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from textgen_jax import errors
from textgen_jax.models import base
from textgen_jax.sampling import sampler as sampler_lib
from textgen_jax.sampling.params import SamplingParams
from textgen_jax.text import base as text_base


@dataclasses.dataclass
class Completion:
  """What became of one row."""

  prompt: str
  text: str  # generated, without the prompt and without the stop text
  tokens: list[int]  # generated ids, to the one that completes the stop text or ends the document
  sample_index: int
  seed: int
  finish_reason: str  # length | stop (a stop text) | end (of the document)


def generate(
  model: base.LanguageModel,
  params: Any,
  tokenizer: text_base.Tokenizer,
  prompts: Sequence[str],
  settings: SamplingParams | Sequence[SamplingParams],
) -> list[Completion]:
  """Completions of every prompt, `num_samples` each, in the prompts' order.

  Args:
    model: any model of the contract.
    params: its parameters; sharded ones are fine.
    tokenizer: the one that the model was trained with.
    prompts: texts; an empty one stands for the start of a document.
    settings: one for all prompts, or one each.

  Raises:
    UserError: a prompt has a character that the tokenizer doesn't know.
  """
  each = [settings] * len(prompts) if isinstance(settings, SamplingParams) else settings
  owners = [(p, one, s) for p, one in zip(prompts, each, strict=True) for s in range(one.num_samples)]
  encoded = [prompt_ids(tokenizer, prompt, one.begins_document) for prompt, one in zip(prompts, each, strict=True)]
  ids = [prompt for prompt, one in zip(encoded, each, strict=True) for _ in range(one.num_samples)]
  texts = [_Text(tokenizer, prompt, one) for prompt, (_, one, _) in zip(ids, owners, strict=True)]
  sampler = _sampler(model, params, tokenizer, ids, [one for _, one, _ in owners], [s for _, _, s in owners])
  for drawn in sampler:
    for row, new in drawn.items():
      texts[row].feed(new)
      if texts[row].stopped:
        sampler.finish(row)
  for text in texts:
    text.flush()
  return [
    Completion(p, text.text, text.ids, s, one.seed, text.finish_reason)
    for text, (p, one, s) in zip(texts, owners, strict=True)
  ]


def stream(
  model: base.LanguageModel, params: Any, tokenizer: text_base.Tokenizer, prompt: str, settings: SamplingParams
) -> Iterator[str]:
  """One completion in pieces, as they are made; together they are what `generate` gives."""
  ids = prompt_ids(tokenizer, prompt, settings.begins_document)
  text = _Text(tokenizer, ids, settings)
  sampler = _sampler(model, params, tokenizer, [ids], [settings], [0])
  shown = 0
  for drawn in sampler:
    text.feed(drawn[0])
    if text.stopped:
      break
    ready = max(shown, len(text.text) - text.longest_stop + 1)  # a stop text may have begun at the end
    yield text.text[shown:ready]
    shown = ready
  text.flush()
  yield text.text[shown:]


def _sampler(
  model: base.LanguageModel,
  params: Any,
  tokenizer: text_base.Tokenizer,
  prompts: Sequence[Sequence[int]],
  settings: Sequence[SamplingParams],
  sample_indices: Sequence[int],
) -> sampler_lib.Sampler:
  special = tokenizer.special_ids
  return sampler_lib.Sampler(model, params, prompts, settings, sample_indices, special['end_of_text'], special.get('unknown'))


class _Text:
  """One row's ids, and their text up to the stop text that is completed first, wherever segments end."""

  def __init__(self, tokenizer: text_base.Tokenizer, prompt: Sequence[int], settings: SamplingParams):
    self._tokenizer, self._prompt, self._settings, self._stop = tokenizer, prompt, settings, settings.stop
    self._decoder = self._new_decoder()
    self.longest_stop = max(map(len, self._stop), default=1)
    self.ids: list[int] = []
    self.text = ''
    self.stopped = False

  @property
  def finish_reason(self) -> str:
    if self.stopped:
      return 'stop'
    ended = self._settings.stop_at_end and self.ids[-1:] == [self._tokenizer.special_ids['end_of_text']]
    return 'end' if ended else 'length'

  def feed(self, ids: Sequence[int]) -> None:
    self.ids += ids
    self._add(self._decoder.feed(ids))

  def flush(self) -> None:
    """Adds what the end of the stream leaves; nothing where a stop text ended it before."""
    if not self.stopped:
      self._add(self._decoder.flush())

  def _add(self, new: str) -> None:
    searched = max(0, len(self.text) - self.longest_stop + 1)
    self.text += new
    if find_stop(self.text[searched:], self._stop) is None:
      return
    self.stopped = True
    # A whole segment came at once: which of its ids completed a stop text?
    size = bisect.bisect_left(range(len(self.ids)), True, key=lambda n: find_stop(self._text_of(n), self._stop) is not None)
    if size < len(self.ids):
      self.ids, self.text = self.ids[:size], self._text_of(size)
    self.text = self.text[: find_stop(self.text, self._stop)]

  def _text_of(self, size: int) -> str:
    return self._new_decoder().feed(self.ids[:size])

  def _new_decoder(self) -> text_base.IncrementalDecoder:
    """One that has read the prompt: a word's leading space depends on what it follows."""
    decoder = self._tokenizer.incremental_decoder()
    decoder.feed(self._prompt)
    return decoder


def find_stop(text: str, stop: Sequence[str]) -> int | None:
  """Where the first stop text begins; None without one."""
  found = [at for s in stop if (at := text.find(s)) >= 0]
  return min(found) if found else None


def prompt_ids(tokenizer: text_base.Tokenizer, prompt: str, begins_document: bool = False) -> list[int]:
  """The prompt's ids; an empty prompt is what stands before a document."""
  try:
    ids = [int(i) for i in tokenizer.encode(prompt)]
  except errors.UserError as error:
    raise errors.UserError(f'prompt {prompt!r:.60}: {error}') from error
  return [tokenizer.special_ids['end_of_text'], *ids] if begins_document or not ids else ids
