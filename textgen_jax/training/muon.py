"""Muon: momentum whose matrices are made orthogonal before they update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# Each turn pulls all singular values towards 1, from 0.7 to 1.2; Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
TURNS = 5

OnStack = Callable[[jax.Array], jax.Array]
Spread = Callable[[OnStack], OnStack]  # splits the work on a stack of matrices, [N, D, F], over devices


class MuonState(NamedTuple):
  momentum: Any


def alone(work: OnStack) -> OnStack:
  """On one device there is nobody to share the work with."""
  return work


def orthogonalize(x_NDF: jax.Array) -> jax.Array:
  """Each matrix's nearest one with singular values of about 1, by Newton and Schulz's iteration.

  Source: Jordan et al. 2024, as above; Bernstein & Newhouse 2024, arXiv:2409.20325.

  Args:
    x_NDF: matrices; the iteration is cheaper where D is at most F.
  """
  rows, columns = x_NDF.shape[1:]
  x_NDF = x_NDF / (jnp.linalg.norm(x_NDF, axis=(1, 2), keepdims=True) + 1e-8)
  if columns < 2 * rows:
    for _ in range(TURNS):
      x_NDF = _turn(x_NDF @ x_NDF.swapaxes(1, 2)) @ x_NDF
    return x_NDF
  # Each turn multiplies by a polynomial of x @ x.T, whose next one follows from it: wide matrices are read twice, not ten times.
  square_NDD = x_NDF @ x_NDF.swapaxes(1, 2)
  total_NDD = turn_NDD = _turn(square_NDD)
  for _ in range(TURNS - 1):
    square_NDD = turn_NDD @ square_NDD @ turn_NDD
    turn_NDD = _turn(square_NDD)
    total_NDD = turn_NDD @ total_NDD
  return total_NDD @ x_NDF


def _turn(square_NDD: jax.Array) -> jax.Array:
  a, b, c = COEFFICIENTS
  return a * jnp.eye(square_NDD.shape[-1]) + b * square_NDD + c * square_NDD @ square_NDD


def scale_by_muon(momentum: float, spread: Spread = alone) -> optax.GradientTransformation:
  """Nesterov momentum, made orthogonal, and scaled by sqrt(max(1, out / in)) so that one rate fits all shapes.

  Matrices of one shape are made orthogonal together.

  Args:
    momentum: its decay.
    spread: it may add matrices of zeros.
  """

  def init(params: Any) -> MuonState:
    return MuonState(jax.tree.map(jnp.zeros_like, params))

  def update(grads: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
    del params
    kept = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state.momentum, grads)
    ahead = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, kept, grads)
    leaves, structure = jax.tree.flatten(ahead)
    return jax.tree.unflatten(structure, _together(leaves, spread)), MuonState(kept)

  return optax.GradientTransformation(init, update)


def _together(matrices: list[jax.Array], spread: Spread) -> list[jax.Array]:
  by_shape: dict[tuple[int, ...], list[int]] = {}
  for i, matrix in enumerate(matrices):
    if matrix.ndim != 2:
      raise ValueError(f'Muon is for matrices, and one of its parameters has the shape {matrix.shape}')
    by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(i)
  out = list(matrices)
  for places in by_shape.values():
    wide = [matrices[i].T if matrices[i].shape[0] > matrices[i].shape[1] else matrices[i] for i in places]
    made_NDF = spread(orthogonalize)(jnp.stack(wide))
    for n, i in enumerate(places):
      rows, columns = matrices[i].shape
      made = made_NDF[n]
      out[i] = (made.T if rows > columns else made) * max(1.0, columns / rows) ** 0.5
  return out
