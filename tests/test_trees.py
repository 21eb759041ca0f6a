import flax.struct
import numpy as np
import pytest

from textgen_jax import trees


@flax.struct.dataclass
class Pair:
  left: np.ndarray
  right: np.ndarray


TREE = {'block_0': {'mlp': {'up': {'kernel': np.zeros((2, 3))}}}, 'pairs': [Pair(np.zeros(4), np.ones(5)), (np.zeros(()),)], 'none': None}
NAMES = ['block_0/mlp/up/kernel', 'pairs/0/left', 'pairs/0/right', 'pairs/1/0']


def test_leaves_are_named_by_keys_fields_and_places():
  named = trees.named_leaves(TREE)
  assert [name for name, _ in named] == NAMES
  assert dict(named)['pairs/0/right'] is TREE['pairs'][0].right


def test_map_with_names_keeps_the_structure():
  tree, other = {'a': np.zeros(3), 'b': [np.zeros(2)]}, {'a': 10, 'b': [20]}
  mapped = trees.map_with_names(lambda name, leaf, more: (name, leaf.size + more), tree, other)
  assert mapped == {'a': ('a', 13), 'b': [('b/0', 22)]}


def test_the_first_rule_that_is_found_wins():
  rules = [('mlp/.*kernel$', 'matrix'), ('pairs/0', 'first'), ('pairs', 'other'), ('.*', 'rest')]
  assert trees.match_rules(rules, NAMES, 'test') == dict(zip(NAMES, ['matrix', 'first', 'first', 'other'], strict=True))
  assert trees.match_rules(list(reversed(rules)), NAMES, 'test') == dict.fromkeys(NAMES, 'rest')


def test_leaves_that_no_rule_covers_are_all_listed():
  with pytest.raises(ValueError, match=r'^no rule of the decay table covers: pairs/0/left, pairs/1/0$'):
    trees.match_rules([('kernel$', 1), ('right', 2)], NAMES, 'decay')
  assert trees.match_rules([], [], 'decay') == {}


def test_count():
  assert trees.count(TREE) == 6 + 4 + 5 + 1
