"""Leaves by name, and tables of rules that must cover every leaf."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax

T = TypeVar('T')


def _name(path: tuple[Any, ...]) -> str:
  return '/'.join(str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key)))) for key in path)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
  """Leaves in tree order, each with its path: `[('block_0/mlp/up/kernel', array), ...]`."""
  return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def map_with_names(fn: Any, tree: Any, *rest: Any) -> Any:
  """`tree_map` whose function gets the leaf's name first."""
  return jax.tree_util.tree_map_with_path(lambda path, *leaves: fn(_name(path), *leaves), tree, *rest)


def match_rules(rules: Sequence[tuple[str, T]], names: Iterable[str], table: str) -> Mapping[str, T]:
  """The value of the first rule whose pattern is found in each name.

  Args:
    rules: (regular expression, value) pairs; earlier ones win.
    names: leaves' names.
    table: what the rules decide, for the error.

  Raises:
    ValueError: lists the names that no rule covers.
  """
  found: dict[str, T] = {}
  missed = []
  for name in names:
    for pattern, value in rules:
      if re.search(pattern, name):
        found[name] = value
        break
    else:
      missed.append(name)
  if missed:
    raise ValueError(f'no rule of the {table} table covers: {", ".join(missed)}')
  return found


def count(tree: Any) -> int:
  """Numbers in all leaves together."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))
