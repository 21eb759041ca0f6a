"""A trained model as a script wants it: any number of prompts, in batches that fit, in their order.

  generator = Generator.load('runs/shakespeare')
  for completion in generator.generate(['ROMEO:', 'JULIET:'], SamplingParams(temperature=0.8)):
    print(completion.prompt + completion.text)
"""

import dataclasses
import hashlib
import operator
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import tqdm

from textgen_jax import errors
from textgen_jax import workdir as workdir_lib
from textgen_jax.models import base
from textgen_jax.sampling import batch as batch_lib
from textgen_jax.sampling import batching, generate, journal, knobs, speculative
from textgen_jax.sampling import manifest as manifest_lib
from textgen_jax.sampling import params as params_lib
from textgen_jax.sampling.generate import Completion
from textgen_jax.sampling.params import SamplingParams
from textgen_jax.text import base as text_base

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


class _Source(NamedTuple):
  """What makes texts."""

  model: base.LanguageModel
  params: Any
  tokenizer: text_base.Tokenizer
  step: int | None
  draft: speculative.Draft | None


class _Made(NamedTuple):
  """Texts that were given, and what from."""

  source: _Source
  plan: batching.Plan
  rows: list[dict[str, Any]]  # in the prompts' order


class Generator:
  """Texts of one model.

  Args:
    model: any model of the contract (`models/base.py`).
    params: its parameters; sharded ones are fine. Others may take their place, but not within the same tree: manifests and
      journals hash a tree once.
    tokenizer: the one that the model was trained with.
    step: of its checkpoint; a manifest tells it.
    draft: a smaller model of the same tokenizer that guesses ahead: other texts, distributed as without it.
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
    self._hashes: list[tuple[Any, str]] = []
    self._prepared: tuple[_Source, batch_lib.Batch] | None = None
    self._made: _Made | None = None

  @classmethod
  def load(
    cls,
    workdir: str | os.PathLike,
    checkpoint: str = 'best',
    draft: str | os.PathLike | None = None,
    draft_tokens: int = params_lib.DRAFT_TOKENS,
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
    batch_size: int = params_lib.BATCH_SIZE,
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
      transforms: the caller's own, as `sampling.generate` has them. What is compiled holds for these very functions: one that
        is made anew for each call, as a lambda in its arguments is, compiles each time. Keep it.

    Raises:
      UserError: a prompt or settings that can't be, before anything compiles; or fewer texts are possible than num_samples of
        num_beams, which the search finds out.
      NoGoodCheckpoint: a logit isn't a number.
    """
    plan = self._plan(prompts, self._resolve(prompts, settings), batch_size, transforms)
    return self._keep(plan, [*self._run(plan, 0, progress)])

  def generate_to(
    self,
    path: str | os.PathLike,
    prompts: Sequence[str],
    settings: Settings = DEFAULTS,
    *,
    batch_size: int = params_lib.BATCH_SIZE,
    progress: bool = False,
    transforms: Sequence[knobs.Transform] = (),
  ) -> list[Completion]:
    """What `generate` gives, and as JSON lines in a new file.

    Finished batches stand in `path` + '.partial' until all are made; the same call goes on from there, after a kill too. Of
    transforms it knows the names alone.

    Raises:
      UserError: also where `path` exists, or the '.partial' is of other prompts, settings, parameters, versions or batches.
      MachineFailed: the disk.
      KeyboardInterrupt: tells what the '.partial' keeps, where that is anything.
    """
    journal.check_new('output', path)
    plan = self._plan(prompts, self._resolve(prompts, settings), batch_size, transforms)
    with journal.Journal(path, self._request(plan)) as kept:
      made = plan.read(kept.batches, kept.path)
      texts = plan.texts(plan.batches)
      if made:
        print(f'{kept.path}: {sum(map(len, made))} of {texts} texts are there', file=sys.stderr)
      try:
        for batch in self._run(plan, len(made), progress):
          kept.append([text.row() for text in batch])
          made.append(batch)
      except KeyboardInterrupt as error:
        if not made:
          raise
        keeps = f'{kept.path} keeps {sum(map(len, made))} of {texts} texts'
        raise KeyboardInterrupt(f'{keeps}: asked for again, they go on from there') from error
      kept.finish(journal.line(text.row()) for text in plan.in_order(made))
    return self._keep(plan, made)

  def stream(self, prompt: str, settings: SamplingParams = DEFAULTS, *, transforms: Sequence[knobs.Transform] = ()) -> Iterator[str]:
    """One text in pieces, as they are made; never half a character. Checked when called, made when iterated."""
    (resolved,) = self._resolve([prompt], settings)
    return generate.stream(self.model, self.params, self.tokenizer, prompt, resolved, transforms, self.draft)

  def longest(self, prompts: Sequence[str], settings: Settings = DEFAULTS) -> int:
    """The tokens that a text may reach, its prompt's among them: of all, the most. 0 without prompts.

    Raises:
      UserError: as `generate`, which reads the same prompts without encoding them again.
    """
    batch = self._prepare(prompts, self._resolve(prompts, settings))
    return max((len(ids) + one.max_new_tokens for ids, one in zip(batch.ids, batch.settings, strict=True)), default=0)

  def manifest(self) -> list[str]:
    """The lines of a manifest of the texts that `generate` or `generate_to` gave last; `sampling/manifest.py` has the format.

    Raises:
      ValueError: there are none.
    """
    if self._made is None:
      raise ValueError('manifest: nothing was generated yet: call generate or generate_to before')
    source, plan, rows = self._made
    return manifest_lib.lines(self._header(source, plan.batch_size, plan.transforms), rows, plan.batch.settings)

  def reproduce(self, wanted: manifest_lib.Manifest, *, progress: bool = False, transforms: Sequence[knobs.Transform] = ()) -> list[str]:
    """Makes a manifest's texts again, and gives the lines of theirs. What the machine differs in is told on stderr.

    Raises:
      UserError: it was written with other parameters, another tokenizer or other transforms; nothing was compiled.
    """
    size = wanted.header['batch_size']
    header = self._header(self._source(), size, transforms)
    manifest_lib.refuse_other(wanted, header)
    for difference in manifest_lib.differences(wanted, header):
      print(f'{wanted.path} was written elsewhere: {difference}', file=sys.stderr)
    plan = self._plan(wanted.prompts, wanted.settings, size, transforms)
    self._keep(plan, [*self._run(plan, 0, progress)])
    return self.manifest()

  def _source(self) -> _Source:
    return _Source(self.model, self.params, self.tokenizer, self.step, self.draft)

  def _keep(self, plan: batching.Plan, made: Sequence[list[Completion]]) -> list[Completion]:
    """The texts in order, which `manifest` then is about."""
    ordered = plan.in_order(made)
    self._made = _Made(self._source(), plan, [one.row() for one in ordered])
    return ordered

  def _resolve(self, prompts: Sequence[Any], settings: Settings) -> list[SamplingParams]:
    """Settings, one a prompt, as they are meant here."""
    each = [settings] * len(prompts) if isinstance(settings, SamplingParams) else list(settings)
    return [dataclasses.replace(one, begins_document=True) for one in each] if self.begins_document else each

  def _plan(
    self, prompts: Sequence[str], each: Sequence[SamplingParams], batch_size: int, transforms: Sequence[knobs.Transform]
  ) -> batching.Plan:
    params_lib.check_batch_size(batch_size)
    batch = self._prepare(prompts, each)
    cut = batching.cut([len(ids) for ids in batch.ids], [max(one.rows(), one.num_beams) for one in batch.settings], batch_size)
    return batching.Plan(batch, batch_size, cut, tuple(transforms))

  def _prepare(self, prompts: Sequence[str], each: Sequence[SamplingParams]) -> batch_lib.Batch:
    """Prompts and settings, checked. Those of the last call are kept: `longest` and then `generate` ask for the same."""
    source = self._source()
    if self._prepared is not None:
      of, batch = self._prepared
      if all(map(operator.is_, of, source)) and (batch.prompts, batch.settings) == (list(prompts), list(each)):
        return batch._replace(settings=list(each))  # 1 equals 1.0, and a manifest writes them differently
    batch = batch_lib.prepare(self.model, self.params, self.tokenizer, prompts, each, self.draft)
    self._prepared = source, batch
    return batch

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

  def _sha256(self, params: Any) -> str:
    """Of parameters; those of the model and the draft are taken once, for gigabytes take seconds."""
    for known, found in self._hashes:
      if known is params:
        return found
    in_use = (self.params, self.draft and self.draft.params)
    self._hashes = [pair for pair in self._hashes if any(pair[0] is one for one in in_use)]
    self._hashes.append((params, manifest_lib.params_sha256(params)))
    return self._hashes[-1][1]

  def _header(self, source: _Source, batch_size: int, transforms: Sequence[knobs.Transform]) -> dict[str, Any]:
    draft = source.draft
    return {
      'format': manifest_lib.FORMAT,
      'checkpoint': {'step': source.step, 'params_sha256': self._sha256(source.params)},
      'draft': {} if draft is None else {'tokens': draft.tokens, 'params_sha256': self._sha256(draft.params)},
      'tokenizer_sha256': source.tokenizer.fingerprint(),
      'versions': manifest_lib.versions(),
      'platform': manifest_lib.device(),
      'transforms': [getattr(one, '__qualname__', type(one).__qualname__) for one in transforms],
      'batch_size': batch_size,
    }

  def _request(self, plan: batching.Plan) -> dict[str, Any]:
    """All that decides the texts, short."""
    distinct, numbers = manifest_lib.distinct(plan.batch.settings)
    settings = [[manifest_lib.settings_to_json(one) for one in distinct], numbers]
    header = self._header(self._source(), plan.batch_size, plan.transforms)
    return {'prompts': _sha256(plan.batch.prompts), 'settings': _sha256(settings), **header}


def _sha256(value: Any) -> str:
  return hashlib.sha256(journal.line(value).encode('utf-8', 'surrogatepass')).hexdigest()
