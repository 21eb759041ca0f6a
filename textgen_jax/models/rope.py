"""Rotary positions."""

import jax
import jax.numpy as jnp


def rotate(x_BTHK: jax.Array, position_BT: jax.Array, theta: float) -> jax.Array:
  """Turns each pair (k, k + K/2) of every head by its position times a frequency.

  Scores between queries and keys then depend on the distance of their positions alone.
  Source: Su et al. 2021, arXiv:2104.09864; halves paired as in GPT-NeoX and Llama.

  Args:
    x_BTHK: queries or keys; K even.
    position_BT: the token's position in its document, from 0. B may be 1.
    theta: the wavelengths run from 2 pi to about 2 pi theta tokens.
  """
  half = x_BTHK.shape[-1] // 2
  frequency_K = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  # bfloat16 can't hold 257, so angles stay float32.
  angle_BTHK = position_BT[:, :, None, None].astype(jnp.float32) * frequency_K
  cos, sin = jnp.cos(angle_BTHK), jnp.sin(angle_BTHK)
  a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHK.dtype)
