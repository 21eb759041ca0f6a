"""What a caller may ask of a sample."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from textgen_jax import errors
from textgen_jax.sampling import stopping

BATCH_SIZE = 64  # rows at a time
MAX_BATCH_SIZE = 1 << 20
MAX_PROMPT_TOKENS = 1 << 20  # minutes of reading; a model sees no more than its context of them
MAX_PROMPT_CHARACTERS = 8 * MAX_PROMPT_TOKENS  # more aren't cut into tokens, which would take a hundred times the memory
DRAFT_TOKENS = 4  # guessed at a time
MAX_DRAFT_TOKENS = 64  # past a few they are hardly ever all right
MAX_ALTERNATIVES = 64
MAX_BEAMS = 1024
MAX_REGEX_CHARACTERS = 1 << 16  # Python takes a second for a million
MAX_LENGTH_PENALTY = 10  # the tokens ** it, and its inverse, stay numbers: 2**31 ** 10 is 2e93


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
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name in _ITEMS:
        object.__setattr__(self, field.name, _items(field.name, value))  # a list isn't hashable
      else:
        holds, kind = _KINDS[field.type]
        _need(field.name, value, holds(value), kind)
    for name, (holds, constraint) in _RANGES.items():
      _need(name, getattr(self, name), holds(getattr(self, name)), constraint)
    least, most = self.min_new_tokens, self.max_new_tokens
    _need('min_new_tokens', least, 0 <= least <= most, f'in [0, max_new_tokens={most}]')
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


def check_batch_size(size: Any) -> None:
  """Raises UserError where it is none: rows at a time."""
  _need('batch_size', size, _is_whole(size) and 1 <= size <= MAX_BATCH_SIZE, f'a whole number in [1, {MAX_BATCH_SIZE}]')


def _need(name: str, value: Any, holds: bool, constraint: str) -> None:
  if not holds:
    shown = repr(value).replace('\n', ' ')  # an array's has lines
    raise errors.UserError(f'{name}={shown:.100} is not {constraint}')


def _items(name: str, value: Any) -> tuple[Any, ...]:
  """A field of several values as a tuple, checked. A set is sorted: texts in it have another order in another process."""
  holds, what = _ITEMS[name]
  given = value.items() if name == 'logit_bias' and isinstance(value, Mapping) else value
  _need(name, value, not isinstance(given, str | bytes | Mapping), f'a sequence of {what}')
  try:
    found = tuple(sorted(given) if isinstance(given, set | frozenset) else given)
  except TypeError:
    found = None
  _need(name, value, found is not None, f'a sequence of {what}')
  _need(name, value, all(map(holds, found or ())), f'made of {what}')
  return tuple(map(tuple, found or ())) if name == 'logit_bias' else found or ()


def _is_whole(value: Any) -> bool:
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
  try:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and isinstance(float(value), float)
  except OverflowError:  # a whole number of 400 digits
    return False


def _is_switch(value: Any) -> bool:
  return isinstance(value, bool | np.bool_)


def _is_text(value: Any) -> bool:
  return isinstance(value, str)


def _is_id(value: Any) -> bool:
  return _is_whole(value) and 0 <= value < 2**31


def _is_bias(value: Any) -> bool:
  return isinstance(value, tuple | list) and len(value) == 2 and _is_id(value[0]) and _is_number(value[1]) and math.isfinite(value[1])


_Check = tuple[Callable[[Any], bool], str]  # and what is told where it doesn't hold

_KINDS: dict[Any, _Check] = {
  int: (_is_whole, 'a whole number'),
  float: (_is_number, 'a number (float)'),
  bool: (_is_switch, 'True or False'),
  str: (_is_text, 'a text'),
}
_ITEMS: dict[str, _Check] = {
  **dict.fromkeys(('banned_tokens', 'stop_tokens'), (_is_id, 'token ids')),
  **dict.fromkeys(('stop', 'choices'), (lambda one: _is_text(one) and one != '', 'texts with at least one character')),
  'logit_bias': (_is_bias, '(token id, finite number)'),
}
_COUNT: _Check = (lambda n: 0 <= n < 2**31, 'at least 0 and below 2**31')
_MASS: _Check = (lambda p: 0 < p <= 1, 'in (0, 1]')
# What is asked of a value of the right type. `__post_init__` and `_agree` have what depends on other fields.
_RANGES: dict[str, _Check] = {
  **dict.fromkeys(('max_new_tokens', 'top_k', 'lines', 'sentences'), _COUNT),
  **dict.fromkeys(('top_p', 'typical_p'), _MASS),
  **dict.fromkeys(('presence_penalty', 'frequency_penalty', 'guidance'), (math.isfinite, 'a finite number')),
  'temperature': (lambda x: math.isfinite(x) and x >= 0, 'a finite number of at least 0'),
  'min_p': (lambda p: 0 <= p <= 1, 'in [0, 1]'),
  'repetition_penalty': (lambda x: math.isfinite(x) and x > 0, 'a finite number above 0'),
  'no_repeat_ngram': (lambda n: 0 <= n < 2**16, 'at least 0 and below 2**16'),
  'seed': (lambda n: 0 <= n < 2**32, 'in [0, 2**32)'),
  'num_samples': (lambda n: 1 <= n < 2**20, 'at least 1 and below 2**20'),
  'best_of': (lambda n: 0 <= n < 2**20, 'in [0, 2**20)'),
  **dict.fromkeys(('regex', 'stop_regex'), (lambda text: len(text) <= MAX_REGEX_CHARACTERS, 'at most 2**16 characters long')),
  'num_beams': (lambda n: 0 <= n <= MAX_BEAMS, f'in [0, {MAX_BEAMS}]'),
  'length_penalty': (lambda x: -MAX_LENGTH_PENALTY <= x <= MAX_LENGTH_PENALTY, f'in [{-MAX_LENGTH_PENALTY}, {MAX_LENGTH_PENALTY}]'),
  'min_log_prob': (lambda x: x < 0, 'below 0'),
  'alternatives': (lambda n: 0 <= n <= MAX_ALTERNATIVES, f'in [0, {MAX_ALTERNATIVES}]'),
}
