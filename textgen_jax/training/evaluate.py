"""What a model makes of a text: losses by token, over rows that the text alone fixes, and the scores that they add up to."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from textgen_jax import errors, processes, sharding
from textgen_jax.data import tokens, windows
from textgen_jax.models import base
from textgen_jax.training import losses

# A row of an evaluation with carried state, about. Each begins with one call that only warms the state up.
CARRIED_ROW_TOKENS = 8192


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
  """Losses summed over each document, and what the documents measure.

  bits per byte, bits per character and word perplexity are of the text: they take all losses together, ends of documents too, and
  charge the spelling of each piece that has no id with 8 bits a byte and as many for its end. They let tokenizers be compared.
  Standard errors are over documents, of a ratio of two sums. Source: Cochran 1977, Sampling Techniques, section 6.4.
  """

  nll_sums: np.ndarray  # float64, nats; one a document
  documents: np.ndarray  # tokens.DOCUMENT
  standardizes: bool = False  # the tokenizer's own; then the text isn't what the tokens stand for

  @property
  def tokens(self) -> int:
    return int(self.documents['tokens'].sum())

  @property
  def loss_nats(self) -> float:
    return float(self.nll_sums.sum()) / self.tokens

  @property
  def perplexity(self) -> float:
    return _exp(self.loss_nats)

  @property
  def text_nll(self) -> np.ndarray:
    """Nats of each document's text, spelling included."""
    spelled = self.documents['unknown_bytes'] + self.documents['unknowns']
    return self.nll_sums + math.log(256) * spelled

  def per(self, measure: str) -> float | None:
    """Nats of text per 'bytes', 'characters' or 'words'; None where it can't be told."""
    total = int(self.documents[measure].sum())
    return None if self.standardizes or not total else float(self.text_nll.sum()) / total

  def stderr(self, nll_sums: np.ndarray, measure: str) -> float | None:
    """Standard error of the ratio of a loss and a measure, both summed over documents; None for less than two."""
    sizes = self.documents[measure].astype(np.float64)
    count = len(sizes)
    if count < 2 or not sizes.sum():
      return None
    residual = nll_sums - sizes * (nll_sums.sum() / sizes.sum())
    return math.sqrt(count / (count - 1) * float((residual**2).sum())) / float(sizes.sum())

  @property
  def bits_per_byte(self) -> float | None:
    nats = self.per('bytes')
    return None if nats is None else nats / math.log(2)

  def summary(self) -> dict[str, Any]:
    """Everything, as JSON values."""
    bits_per_character, word_nats = self.per('characters'), self.per('words')
    bytes_error = None if self.bits_per_byte is None else self.stderr(self.text_nll, 'bytes')
    return {
      'loss_nats': self.loss_nats,
      'loss_nats_stderr': self.stderr(self.nll_sums, 'tokens'),
      'perplexity': self.perplexity,
      'bits_per_byte': self.bits_per_byte,
      'bits_per_byte_stderr': None if bytes_error is None else bytes_error / math.log(2),
      'bits_per_character': None if bits_per_character is None else bits_per_character / math.log(2),
      'word_perplexity': None if word_nats is None else _exp(word_nats),
      'documents': len(self.documents),
      **{name: int(self.documents[name].sum()) for name in ('tokens', 'bytes', 'characters', 'words', 'unknowns')},
    }

  def of(self, document: int) -> 'Score':
    """One document's."""
    one = slice(document, document + 1)
    return Score(self.nll_sums[one], self.documents[one], self.standardizes)


def _exp(nats: float) -> float:
  return math.exp(min(nats, 700.0))  # float64 ends at exp(709)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
  """How a text is read to be scored.

  A Transformer reads rows of one call; with `stride` below `length` they overlap, and every token that is scored has at least
  `length - stride` tokens before it. A model that was trained to carry its state reads long rows in several calls.
  """

  length: int  # tokens in one call
  stride: int = 0  # tokens from one row to the next, for rows of one call; 0: length, rows don't overlap
  carried: bool = False
  end_of_text: int | None = None  # no document sees another; None: it does

  @property
  def chunks(self) -> int:
    """Calls that one row takes."""
    return 1 + -(-CARRIED_ROW_TOKENS // self.length) if self.carried else 1

  def rows(self, split: tokens.Split) -> windows.EvaluationRows:
    row_length = self.length * self.chunks
    stride = row_length - self.length if self.carried else self.stride or self.length
    return windows.EvaluationRows(split, row_length, stride, self.end_of_text)


@functools.partial(jax.jit, static_argnames='model')
def nll(model: base.LanguageModel, params: Any, cache: Any, batch: windows.Batch) -> tuple[jax.Array, Any]:
  """Each target's loss (nats), [B, T], and the cache after the batch."""
  return _measured(losses.nll, model, params, cache, batch)


@functools.partial(jax.jit, static_argnames='model')
def nll_and_entropy(model: base.LanguageModel, params: Any, cache: Any, batch: windows.Batch) -> tuple[jax.Array, Any]:
  """Each target's loss and the entropy of the distribution that predicts it (nats), [B, T, 2], and the cache after the batch."""

  def both(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    return jnp.stack([losses.nll(logits_BTV, targets_BT), losses.entropy(logits_BTV)], axis=-1)

  return _measured(both, model, params, cache, batch)


def _measured(
  of_logits: Callable[[jax.Array, jax.Array], jax.Array], model: base.LanguageModel, params: Any, cache: Any, batch: windows.Batch
) -> tuple[jax.Array, Any]:
  hidden_BTD, cache = model.apply({'params': params}, batch.tokens_BT, cache=cache, starts_BT=batch.starts_BT)

  def unembed(hidden_BTD: jax.Array) -> jax.Array:
    return model.apply({'params': params}, hidden_BTD, method='unembed')

  return losses.measure(of_logits, unembed, hidden_BTD, batch.targets_BT), cache


def token_losses(
  model: base.LanguageModel,
  params: Any,
  split: tokens.Split,
  reading: Reading,
  *,
  batch_size: int,
  put: Callable[[Any], Any] = jax.device_put,
  divisor: int = 1,
  measure: Callable[..., tuple[jax.Array, Any]] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Places of tokens and their losses (nats), in no order: every token but the first that counts, each once, without dropout.

  Neither rows nor what they hold depend on `batch_size`.

  Args:
    model: the model.
    params: its parameters.
    split: the text.
    reading: how to read it.
    batch_size: rows in one call.
    put: brings arrays that lead with B to the devices.
    divisor: what `batch_size` is a multiple of, and must stay (the devices that rows are split over).
    measure: what is taken of each token instead of `nll`, and like it; its values lead with [B, T].

  Raises:
    UserError: a token id is at or over the model's vocabulary.
  """
  rows, length = reading.rows(split), reading.length
  batch_size = min(batch_size, -(-rows.num_rows // divisor) * divisor)  # a short text has fewer rows
  waiting: list[tuple[np.ndarray, np.ndarray, jax.Array]] = []
  for low in range(0, rows.num_rows, batch_size):
    batch, places_BT = rows.batch(low, low + batch_size)
    largest = max(batch.tokens_BT.max(), batch.targets_BT.max())
    if largest >= model.vocab_size:
      raise errors.UserError(f'token id {largest} is not in the vocabulary [0, {model.vocab_size})')
    cache = put(model.init_cache(batch_size, 0)) if reading.carried else None
    for chunk in range(reading.chunks):
      at = np.s_[:, chunk * length : (chunk + 1) * length]
      part = jax.tree.map(lambda x, at=at: np.ascontiguousarray(x[at]), batch)
      if chunk and not batch.weights_BT[:, chunk * length :].any():
        break
      values_BT, cache = (measure or nll)(model, params, cache, put(part))
      waiting.append((part.weights_BT > 0, places_BT[at], values_BT))
      # Two calls in flight keep the device busy; a long queue of collectives can lock up several CPU devices.
      if len(waiting) > 1:
        yield _counted(*waiting.pop(0))
  for one in waiting:
    yield _counted(*one)


def _counted(counts_BT: np.ndarray, places_BT: np.ndarray, values_BT: Any) -> tuple[np.ndarray, np.ndarray]:
  values_BT = sharding.to_host(values_BT)
  processes.beat()
  return places_BT[counts_BT], values_BT[counts_BT]


def evaluate(
  model: base.LanguageModel, params: Any, split: tokens.Split, reading: Reading, *, standardizes: bool = False, **how: Any
) -> Score:
  """The score of a text; `how` as `token_losses` takes it. Losses are added in float64, whatever their order."""
  nll_sums = np.zeros(len(split.documents), np.float64)
  for places, values in token_losses(model, params, split, reading, **how):
    # A document's first target comes right after its start, and the last stands where the next one starts.
    owners = np.searchsorted(split.documents['start'], places, side='left') - 1
    np.add.at(nll_sums, owners, values.astype(np.float64))
  return Score(nll_sums, split.documents, standardizes)
