"""What a caller may ask of a sample."""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

from textgen_jax import errors
from textgen_jax.sampling import stopping

MAX_STOP_TOKENS = 64
MAX_ALTERNATIVES = 64
MAX_BEAMS = 1024
DRAFT_TOKENS = 4  # guessed at a time
MAX_DRAFT_TOKENS = 64  # past a few they are hardly ever all right


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
  """How tokens are drawn and when a text ends. The order is `transforms`'; each field may differ from row to row."""

  max_new_tokens: int = 200  # as many as wanted, past the trained context too
  temperature: float = 1.0  # logits are divided by it: low is safe, high is wild, 0 is the likeliest token always
  top_k: int = 0  # draw among the k likeliest tokens; 0: all
  top_p: float = 1.0  # draw among the fewest tokens that hold this much probability; 1: all
  min_p: float = 0.0  # drop tokens below this fraction of the likeliest one's probability; 0: none
  typical_p: float = 1.0  # draw among the tokens nearest to the expected surprise that hold this much probability; 1: all
  repetition_penalty: float = 1.0  # divides the positive logits of tokens in prompt and text, multiplies the negative ones; 1: none
  presence_penalty: float = 0.0  # taken off the logits of tokens that the text has; 0: none
  frequency_penalty: float = 0.0  # taken off a token's logit each time that the text has it; 0: none
  no_repeat_ngram: int = 0  # no n tokens in a row occur twice in prompt and text; 0: they may
  logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, nats added to its logit); a mapping does too
  banned_tokens: tuple[int, ...] = ()  # ids that are never drawn
  min_new_tokens: int = 0  # before so many neither end_of_text nor a stop token is drawn
  guidance: float = 1.0  # logits go from those after negative_prompt this far towards, or past, those after the prompt; 1: off
  negative_prompt: str = ''  # what guidance leads away from; empty: what stands before a document
  regex: str = ''  # the text matches this expression, in full; empty: it's free
  choices: tuple[str, ...] = ()  # the text is one of these; none: it's free
  seed: int = 0  # another seed, another text
  num_samples: int = 1  # of each prompt
  best_of: int = 0  # draw so many, and keep the num_samples likeliest; 0: keep all that are drawn
  num_beams: int = 0  # search for the likeliest texts with so many beams, and give the num_samples best; 0: draw
  length_penalty: float = 1.0  # best_of and num_beams rank by log-probability / tokens ** this; 0: by log-probability
  stop: tuple[str, ...] = ()  # a text ends before the first of these
  stop_regex: str = ''  # a text ends before the first match of this expression; empty: none
  lines: int = 0  # a text is so many whole lines; 0: it goes on
  sentences: int = 0  # a text is so many whole sentences; 0: it goes on
  stop_tokens: tuple[int, ...] = ()  # a text ends with the first of these ids
  min_log_prob: float = -math.inf  # a text ends where its log-probability (nats, in all) falls below this
  begins_document: bool = False  # the prompt is a document's beginning, which end_of_text stands before in training
  stop_at_end: bool = True  # a text ends where the model ends its document; False: the next document follows
  allow_unknown: bool = False  # may draw the token for what has no id of its own, such as <unk>
  log_probs: bool = False  # tell each token's log-probability
  alternatives: int = 0  # tell so many of the likeliest tokens at each place

  def __post_init__(self) -> None:
    if isinstance(self.logit_bias, Mapping):
      object.__setattr__(self, 'logit_bias', tuple(self.logit_bias.items()))

    def need(name: str, holds: bool, constraint: str) -> None:
      if not holds:
        raise errors.UserError(f'{name}={getattr(self, name)!r} is not {constraint}')

    def finite(name: str, low: float, constraint: str) -> None:
      value = getattr(self, name)
      need(name, _is_number(value) and math.isfinite(value) and value >= low, constraint)

    def whole(name: str, low: int, high: int, constraint: str) -> None:
      value = getattr(self, name)
      need(name, _is_whole(value) and low <= value < high, constraint)

    whole('max_new_tokens', 0, 2**31, 'at least 0 and below 2**31')
    finite('temperature', 0, 'a finite number of at least 0')
    whole('top_k', 0, 2**31, 'at least 0 and below 2**31')
    need('top_p', 0 < self.top_p <= 1, 'in (0, 1]')
    need('min_p', 0 <= self.min_p <= 1, 'in [0, 1]')
    need('typical_p', 0 < self.typical_p <= 1, 'in (0, 1]')
    finite('repetition_penalty', 0, 'a finite number above 0')
    need('repetition_penalty', self.repetition_penalty > 0, 'a finite number above 0')
    finite('presence_penalty', -math.inf, 'a finite number')
    finite('frequency_penalty', -math.inf, 'a finite number')
    whole('no_repeat_ngram', 0, 2**16, 'at least 0 and below 2**16')
    need('logit_bias', all(_is_id(i) and math.isfinite(bias) for i, bias in self.logit_bias), 'made of (token id, finite number)')
    need('banned_tokens', all(map(_is_id, self.banned_tokens)), 'made of token ids')
    whole('min_new_tokens', 0, self.max_new_tokens + 1, f'in [0, max_new_tokens={self.max_new_tokens}]')
    finite('guidance', -math.inf, 'a finite number')
    whole('seed', 0, 2**32, 'in [0, 2**32)')
    whole('num_samples', 1, 2**20, 'at least 1 and below 2**20')
    whole('num_beams', 0, MAX_BEAMS + 1, f'in [0, {MAX_BEAMS}]')
    finite('length_penalty', -math.inf, 'a finite number')
    for name in ('stop', 'choices'):
      value = getattr(self, name)
      need(name, not isinstance(value, str), 'a sequence of texts, but one text')
      need(name, all(value), 'made of texts with at least one character')
    need('stop_tokens', all(map(_is_id, self.stop_tokens)), 'made of token ids')
    need('stop_tokens', len(self.stop_tokens) <= MAX_STOP_TOKENS, f'at most {MAX_STOP_TOKENS} ids')
    whole('lines', 0, 2**31, 'at least 0 and below 2**31')
    whole('sentences', 0, 2**31, 'at least 0 and below 2**31')
    need('min_log_prob', self.min_log_prob < 0, 'below 0')
    whole('alternatives', 0, MAX_ALTERNATIVES + 1, f'in [0, {MAX_ALTERNATIVES}]')
    for name in ('stop', 'choices', 'logit_bias', 'banned_tokens', 'stop_tokens'):  # a list isn't hashable
      object.__setattr__(self, name, tuple(getattr(self, name)))
    if self.stop_regex:
      stopping.compile_regex(self.stop_regex)
    self._agree()

  def _agree(self) -> None:
    """Fields that can't go together."""

    def refuse(wrong: bool, what: str) -> None:
      if wrong:
        raise errors.UserError(what)

    refuse(bool(self.negative_prompt) and self.guidance == 1, 'negative_prompt needs a guidance other than 1')
    refuse(bool(self.regex and self.choices), 'regex and choices: give one of them')
    refuse(not 0 <= self.best_of < 2**20, f'best_of={self.best_of} is not in [0, 2**20)')
    short = 0 < self.best_of < self.num_samples
    refuse(short, f'best_of={self.best_of} is below num_samples={self.num_samples}, which are taken from them')
    refuse(bool(self.best_of and not self.temperature), f'best_of={self.best_of} at temperature=0: all would be the same')
    if self.num_beams:
      refuse(self.num_samples > self.num_beams, f'num_beams={self.num_beams} is below num_samples={self.num_samples}, which it gives')
      drawn = {'top_k': 0, 'top_p': 1, 'min_p': 0, 'typical_p': 1, 'best_of': 0}
      ends = {'stop': (), 'stop_regex': '', 'lines': 0, 'sentences': 0, 'min_log_prob': -math.inf}
      refuse(self.temperature not in (0, 1), f'num_beams={self.num_beams} draws nothing: leave temperature={self.temperature} at 1')
      for name, value in {**drawn, **ends}.items():
        why = 'draws nothing' if name in drawn else 'ends texts at end_of_text, stop_tokens or max_new_tokens alone'
        set_to = getattr(self, name)
        refuse(set_to != value, f'num_beams={self.num_beams} {why}: leave {name}={set_to!r} at {value!r}')

  def rows(self) -> int:
    """How many texts are drawn for a prompt."""
    return self.best_of or self.num_samples


def _is_number(value: Any) -> bool:
  return isinstance(value, numbers.Real)


def _is_whole(value: Any) -> bool:
  return isinstance(value, numbers.Integral)


def _is_id(value: Any) -> bool:
  return _is_whole(value) and 0 <= value < 2**31
