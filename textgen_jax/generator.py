"""A trained model as a script wants it: any number of prompts, in batches that fit, in their order.

  generator = Generator.load('runs/shakespeare')
  for completion in generator.generate(['ROMEO:', 'JULIET:'], SamplingParams(temperature=0.8)):
    print(completion.prompt + completion.text)
"""

import dataclasses
import functools
import hashlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import tqdm

from textgen_jax import errors
from textgen_jax import workdir as workdir_lib
from textgen_jax.models import base
from textgen_jax.sampling import batch as batch_lib
from textgen_jax.sampling import batching, generate, journal, knobs, speculative
from textgen_jax.sampling import manifest as manifest_lib
from textgen_jax.sampling.generate import Completion
from textgen_jax.sampling.params import SamplingParams
from textgen_jax.text import base as text_base

BATCH_SIZE = 64  # rows
DRAFT_TOKENS = 4  # guessed at a time
DEFAULTS = SamplingParams()

Settings = SamplingParams | Sequence[SamplingParams]


@dataclasses.dataclass(frozen=True)
class Timing:
  """Of the last call. Its first batches compile, which is counted."""

  prompts: int
  texts: int
  tokens: int  # of the texts, without the prompts'
  seconds: float

  @property
  def tokens_per_s(self) -> float:
    return self.tokens / self.seconds if self.seconds else 0.0

  def __str__(self) -> str:
    made = f'prompts: {self.prompts:,}, texts: {self.texts:,}, tokens: {self.tokens:,}'
    return f'{made}, in {self.seconds:.1f} s, compilation included: {self.tokens_per_s:,.0f} tokens/s'


class Generator:
  """Texts of one model.

  Args:
    model: any model of the contract (`models/base.py`).
    params: its parameters; sharded ones are fine.
    tokenizer: the one that the model was trained with.
    step: of its checkpoint; a manifest tells it.
    draft: a smaller model of the same tokenizer that guesses ahead: it changes how long texts take, and not the texts.
    begins_document: prompts begin a document, whether settings say so or not.

  Attributes:
    timing: of the last `generate`, `generate_to` or `reproduce`; None before.
  """

  def __init__(
    self,
    model: base.LanguageModel,
    params: Any,
    tokenizer: text_base.Tokenizer,
    step: int | None = None,
    draft: speculative.Draft | None = None,
    begins_document: bool = False,
  ):
    self.model, self.params, self.tokenizer, self.step, self.draft = model, params, tokenizer, step, draft
    self.begins_document = begins_document
    self.timing: Timing | None = None

  @classmethod
  def load(
    cls, workdir: str | os.PathLike, checkpoint: str = 'best', draft: str | os.PathLike | None = None, draft_tokens: int = DRAFT_TOKENS
  ) -> 'Generator':
    """The model of a training run, and one of another run as its draft; prompts begin documents if it was trained on documents apart.

    Raises:
      UserError: there is none, or the draft has another tokenizer. `workdir.load` has the arguments and the other errors.
    """
    trained = workdir_lib.load(workdir, checkpoint)
    guess = None
    if draft is not None:
      other = workdir_lib.load(draft)
      if other.tokenizer.fingerprint() != trained.tokenizer.fingerprint():
        raise errors.UserError(f"draft={str(draft)!r}: its tokenizer isn't the one of workdir={str(workdir)!r}")
      guess = speculative.Draft(other.model, other.params, draft_tokens)
    apart = trained.experiment.training.mask_documents
    return cls(trained.model, trained.params, trained.tokenizer, trained.step, guess, apart)

  def generate(
    self,
    prompts: Sequence[str],
    settings: Settings = DEFAULTS,
    *,
    batch_size: int = BATCH_SIZE,
    progress: bool = False,
    transforms: Sequence[knobs.Transform] = (),
  ) -> list[Completion]:
    """Completions of every prompt, `num_samples` each, in the prompts' order.

    Rows are sorted by the prompts' tokens, the longest first: what doesn't fit in memory shows at once.

    Args:
      prompts: texts; an empty one stands for the start of a document.
      settings: one for all prompts, or one each.
      batch_size: rows at a time. Those of one prompt stay together: a prompt with more is a batch of its own.
      progress: shows a bar on stderr where there is more than one batch.
      transforms: the caller's own, as `sampling.generate` has them.

    Raises:
      UserError: a prompt or settings that can't be, before anything compiles.
      NoGoodCheckpoint: a logit isn't a number.
    """
    plan = self._plan(prompts, self._resolve(prompts, settings), batch_size, transforms)
    return plan.in_order([*self._run(plan, 0, progress)])

  def generate_to(
    self,
    path: str | os.PathLike,
    prompts: Sequence[str],
    settings: Settings = DEFAULTS,
    *,
    batch_size: int = BATCH_SIZE,
    progress: bool = False,
    transforms: Sequence[knobs.Transform] = (),
  ) -> list[Completion]:
    """What `generate` gives, and as JSON lines in a new file.

    Finished batches stand in `path` + '.partial' until all are made; the same call goes on from there, after a kill too. Of
    transforms it knows the names alone.

    Raises:
      UserError: also where `path` exists, or the '.partial' is of other prompts, settings, parameters, versions or batches.
      MachineFailed: the disk.
    """
    journal.check_new('output', path)
    plan = self._plan(prompts, self._resolve(prompts, settings), batch_size, transforms)
    with journal.Journal(path, self._request(plan)) as kept:
      made = [plan.read(batch, rows, kept.path) for rows, batch in zip(kept.batches, plan.batches, strict=False)]
      if made:
        print(f'{kept.path}: {sum(map(len, made))} of {plan.texts(plan.batches)} texts are there', file=sys.stderr)
      try:
        for texts in self._run(plan, len(made), progress):
          kept.append([text.row() for text in texts])
          made.append(texts)
      except KeyboardInterrupt:
        if made:
          print(f'{kept.path} keeps {sum(map(len, made))} texts: the same command goes on from there', file=sys.stderr)
        raise
      ordered = plan.in_order(made)
      kept.finish(journal.line(text.row()) for text in ordered)
    return ordered

  def stream(self, prompt: str, settings: SamplingParams = DEFAULTS) -> Iterator[str]:
    """One text in pieces, as they are made; never half a character. Checked when called, made when iterated."""
    self._check_text(prompt)
    (resolved,) = self._resolve([prompt], settings)
    return generate.stream(self.model, self.params, self.tokenizer, prompt, resolved, draft=self.draft)

  def manifest(
    self,
    completions: Sequence[Completion],
    settings: Settings,
    *,
    batch_size: int = BATCH_SIZE,
    transforms: Sequence[knobs.Transform] = (),
  ) -> list[str]:
    """The lines of a manifest of what `generate` gave for these arguments; `manifest` has the format."""
    prompts = range(len(completions) // settings.num_samples) if isinstance(settings, SamplingParams) else settings
    return self._manifest(completions, self._resolve(prompts, settings), batch_size, transforms)

  def reproduce(self, wanted: manifest_lib.Manifest, *, progress: bool = False, transforms: Sequence[knobs.Transform] = ()) -> list[str]:
    """Makes a manifest's texts again, and gives the lines of theirs. What the machine differs in is told on stderr.

    Raises:
      UserError: it was written with other parameters, another tokenizer or other transforms; nothing was compiled.
    """
    header, size = self._header(wanted.header['batch_size'], transforms), wanted.header['batch_size']
    manifest_lib.refuse_other(wanted, header)
    for difference in manifest_lib.differences(wanted, header):
      print(f'{wanted.path} was written elsewhere: {difference}', file=sys.stderr)
    plan = self._plan(wanted.prompts, wanted.settings, size, transforms)
    made = plan.in_order([*self._run(plan, 0, progress)])
    return self._manifest(made, wanted.settings, size, transforms)

  def _manifest(
    self, completions: Sequence[Completion], each: Sequence[SamplingParams], batch_size: int, transforms: Sequence[knobs.Transform]
  ) -> list[str]:
    return manifest_lib.lines(self._header(batch_size, transforms), [one.row() for one in completions], each)

  def _resolve(self, prompts: Sequence[Any], settings: Settings) -> list[SamplingParams]:
    """Settings, one a prompt, as they are meant here."""
    each = [settings] * len(prompts) if isinstance(settings, SamplingParams) else list(settings)
    if len(each) != len(prompts):
      raise errors.UserError(f'settings: there are {len(each)} for {len(prompts)} prompts: give one, or one a prompt')
    return [dataclasses.replace(one, begins_document=True) for one in each] if self.begins_document else each

  def _plan(
    self, prompts: Sequence[str], each: Sequence[SamplingParams], batch_size: int, transforms: Sequence[knobs.Transform]
  ) -> batching.Plan:
    if isinstance(prompts, str):
      raise errors.UserError(f'prompts={prompts!r:.60} is one text: give a list')
    if not 1 <= batch_size <= manifest_lib.MAX_BATCH_SIZE:
      raise errors.UserError(f'batch_size={batch_size} is not in [1, {manifest_lib.MAX_BATCH_SIZE}]')
    for prompt in prompts:
      self._check_text(prompt)
    batch = batch_lib.prepare(self.model, self.params, self.tokenizer, prompts, each, self.draft)
    cut = batching.cut([len(ids) for ids in batch.ids], [max(one.rows(), one.num_beams) for one in each], batch_size)
    return batching.Plan(batch, batch_size, cut, transforms)

  def _check_text(self, prompt: str) -> None:
    at = text_base.first_surrogate(prompt)
    if at >= 0:
      raise errors.UserError(f'prompt {prompt!r:.60}: {prompt[at]!r} at offset {at} is not UTF-8 text')

  def _run(self, plan: batching.Plan, first: int, progress: bool) -> Iterator[list[Completion]]:
    """The texts of each batch from the first that isn't made yet."""
    began, texts, tokens, left = time.monotonic(), 0, 0, plan.batches[first:]
    bar = tqdm.tqdm(
      total=plan.texts(plan.batches),
      initial=plan.texts(plan.batches[:first]),
      desc='sample',
      dynamic_ncols=True,
      disable=not progress or len(plan.batches) < 2,
      bar_format='{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]',
    )
    with bar:
      for batch in left:
        each = generate.complete(self.model, self.params, self.tokenizer, plan.batch.select(batch), plan.transforms, self.draft)
        made = [one for of_prompt in each for one in of_prompt]
        yield made
        texts, tokens = texts + len(made), tokens + sum(len(one.tokens) for one in made)
        bar.set_postfix_str(f'{tokens / (time.monotonic() - began):,.0f} tokens/s', refresh=False)
        bar.update(len(made))
    self.timing = Timing(sum(map(len, left)), texts, tokens, time.monotonic() - began)

  @functools.cached_property
  def _params_sha256(self) -> str:
    return manifest_lib.params_sha256(self.params)  # seconds for gigabytes

  def _header(self, batch_size: int, transforms: Sequence[knobs.Transform]) -> dict[str, Any]:
    return {
      'format': manifest_lib.FORMAT,
      'checkpoint': {'step': self.step, 'params_sha256': self._params_sha256},
      'draft': {} if self.draft is None else {'tokens': self.draft.tokens, 'params_sha256': manifest_lib.params_sha256(self.draft.params)},
      'tokenizer_sha256': self.tokenizer.fingerprint(),
      'versions': manifest_lib.versions(),
      'platform': manifest_lib.device(),
      'transforms': [getattr(one, '__qualname__', type(one).__qualname__) for one in transforms],
      'batch_size': batch_size,
    }

  def _request(self, plan: batching.Plan) -> dict[str, Any]:
    """All that decides the texts, short."""
    distinct, numbers = manifest_lib.distinct(plan.batch.settings)
    settings = [[manifest_lib.settings_to_json(one) for one in distinct], numbers]
    return {'prompts': _sha256(plan.batch.prompts), 'settings': _sha256(settings), **self._header(plan.batch_size, plan.transforms)}


def _sha256(value: Any) -> str:
  return hashlib.sha256(journal.line(value).encode('utf-8', 'surrogatepass')).hexdigest()
