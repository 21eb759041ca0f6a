"""What a caller may ask of a sample."""

import dataclasses
import math

from textgen_jax import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
  """How tokens are drawn. Applied in this order: temperature, top_k, top_p, min_p."""

  max_new_tokens: int = 200
  temperature: float = 1.0  # logits are divided by it; 0: the likeliest token
  top_k: int = 0  # draw among the k likeliest; 0: all
  top_p: float = 1.0  # draw among the fewest tokens that hold this much probability; 1: all
  min_p: float = 0.0  # drop tokens below this fraction of the likeliest one's probability; 0: none
  seed: int = 0
  num_samples: int = 1  # of each prompt
  stop: tuple[str, ...] = ()  # a text ends before the first of these
  begins_document: bool = False  # the prompt is a document's beginning, which end_of_text stands before in training
  stop_at_end: bool = True  # a text ends where the model ends its document; False: the next document follows
  allow_unknown: bool = False  # may draw the token for what has no id of its own, such as <unk>

  def __post_init__(self) -> None:
    def need(name: str, holds: bool, constraint: str) -> None:
      if not holds:
        raise errors.UserError(f'{name}={getattr(self, name)!r} is not {constraint}')

    need('max_new_tokens', self.max_new_tokens >= 0, 'at least 0')
    need('temperature', math.isfinite(self.temperature) and self.temperature >= 0, 'a finite number of at least 0')
    need('top_k', 0 <= self.top_k < 2**31, 'at least 0 and below 2**31')
    need('top_p', 0 < self.top_p <= 1, 'in (0, 1]')
    need('min_p', 0 <= self.min_p <= 1, 'in [0, 1]')
    need('seed', 0 <= self.seed < 2**32, 'in [0, 2**32)')
    need('num_samples', 1 <= self.num_samples < 2**20, 'at least 1 and below 2**20')
    need('stop', not isinstance(self.stop, str), 'a sequence of texts, but one text')
    need('stop', all(self.stop), 'made of texts with at least one character')
