"""What a row has read and drawn: all that a transform may know beside the logits."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class History(NamedTuple):
  """Of every row of a batch. What no transform in use reads is None, and costs nothing."""

  drawn_B: jax.Array  # how many tokens were drawn
  tokens_BL: jax.Array | None = None  # prompt and drawn tokens, from the left
  length_B: jax.Array | None = None  # how many those are
  in_prompt_BV: jax.Array | None = None  # bool
  count_BV: jax.Array | None = None  # how often each token was drawn, int32
  state_B: jax.Array | None = None  # of the row's constraint


def extend(history: History, token_B: jax.Array) -> History:
  """The history after one more token a row; `tokens_BL` must have room."""
  rows = jnp.arange(token_B.shape[0])
  tokens_BL, length_B, count_BV = history.tokens_BL, history.length_B, history.count_BV
  if tokens_BL is not None and length_B is not None:
    tokens_BL, length_B = tokens_BL.at[rows, length_B].set(token_B), length_B + 1
  if count_BV is not None:
    count_BV = count_BV.at[rows, token_B].add(1)
  return history._replace(drawn_B=history.drawn_B + 1, tokens_BL=tokens_BL, length_B=length_B, count_BV=count_BV)


def in_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> np.ndarray:
  """Which tokens each prompt has, bool [B, V]."""
  in_prompt_BV = np.zeros((len(prompts), vocab_size), bool)
  for row, prompt in zip(in_prompt_BV, prompts, strict=True):
    row[list(prompt)] = True
  return in_prompt_BV
