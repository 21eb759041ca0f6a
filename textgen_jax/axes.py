"""The letters that end array names, and the names of parameters' and activations' axes.

An array of known rank carries one letter per axis, in order (`logits_BTV`), and
einsum subscripts use the same letters:

  B batch rows            G key/value groups (heads of keys)
  T time, as queries      K width of one head
  S time, as keys; slots  F hidden width of the feed-forward part
  D model width           V vocabulary, padding included
  H query heads           N stacked layers
"""

# Logical axes: what an axis means. `sharding.py` maps them to axes of the device mesh.
BATCH = 'batch'
TIME = 'time'
EMBED = 'embed'
HEADS = 'heads'  # H * K, or G * K
MLP = 'mlp'
GATES = 'gates'  # an LSTM's four gates, side by side
VOCAB = 'vocab'
POSITION = 'position'

ALL = (BATCH, TIME, EMBED, HEADS, MLP, GATES, VOCAB, POSITION)


def power_of_two(size: int, low: int = 1) -> int:
  """The next power of two, at least `low`, itself one: arrays of about one size then share what was compiled."""
  return max(low, 1 << max(size - 1, 0).bit_length())
