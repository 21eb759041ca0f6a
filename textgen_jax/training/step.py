"""One training step: gradients summed over micro-batches, one guarded update."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from textgen_jax import errors
from textgen_jax.data import windows
from textgen_jax.models import base
from textgen_jax.training import health, losses, optimizer, state

Sums = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, weight); the division happens on the host


class LossInputs(NamedTuple):
  """What a loss hook may use, for one micro-batch."""

  params: Any
  batch: windows.Batch
  hidden_BTD: jax.Array
  unembed: Callable[[jax.Array], jax.Array]  # hidden_BTD -> logits_BTV; pays for the product again
  nll_BT: jax.Array  # nats; with a large vocabulary its gradient pays for the product again
  sown: Any  # the 'intermediates' collection that modules have sown
  key: jax.Array  # this micro-batch's own


# Returns a term that is added to the summed loss (so scale it like a sum over tokens, not a mean), and metrics.
LossHook = Callable[[LossInputs], tuple[jax.Array, Sums]]


def no_hook(inputs: LossInputs) -> tuple[jax.Array, Sums]:
  del inputs
  return jnp.zeros(()), {}


# The collection of losses that aren't of prediction: each a number a token, [B, T], or one for all tokens. They are weighted as tokens are,
# so that their mean joins the mean loss, in the objective but not in what is reported.
LOSSES = 'losses'

COUNTS = ('skipped_steps', 'spiked_steps', 'skipped_in_a_row')  # of all steps so far
RESERVED = ('loss', 'objective', 'grad_norm', 'learning_rate', *COUNTS, 'tokens_per_s', 'mfu')


def check_hook(extra: Any, metrics: Any) -> None:
  """Raises UserError, while the step is traced, for what the step could not sum or would overwrite."""
  if jnp.shape(extra) != ():
    raise errors.UserError(f'the loss hook gives a term of shape {jnp.shape(extra)}, not a scalar')
  for name, value in metrics.items():
    if name in RESERVED:
      raise errors.UserError(f"the loss hook's metric {name!r} bears a name of the step's own: {', '.join(RESERVED)}")
    if not (isinstance(value, tuple) and len(value) == 2 and all(jnp.shape(part) == () for part in value)):
      raise errors.UserError(f"the loss hook's metric {name!r} is not a pair of scalars (sum, weight)")


class Terms(NamedTuple):
  """The loss of one micro-batch, in its parts."""

  loss: jax.Array  # nats, summed over tokens by weight
  extra: jax.Array  # the hook's term
  sown_loss: jax.Array  # what modules have sown as losses, by weight
  weight: jax.Array
  metrics: Sums  # the hook's
  nll_BT: jax.Array  # nats
  hidden_BTD: jax.Array
  carry: Any
  sown: Any

  @property
  def objective(self) -> jax.Array:
    """What is differentiated."""
    return self.loss + self.extra + self.sown_loss


def loss_terms(
  model: base.LanguageModel,
  hook: LossHook,
  params: Any,
  carry: Any,
  batch: windows.Batch,
  key: jax.Array,
  collections: Sequence[str] = ('intermediates',),
  row_ways: int = 1,
) -> Terms:
  """The forward pass of training: dropout is on; modules may sow into `collections` beside `LOSSES`; rows are split `row_ways` ways."""
  dropout_key, hook_key = jax.random.split(key)
  (hidden_BTD, carry), sown = model.apply(
    {'params': params},
    batch.tokens_BT,
    cache=carry,
    starts_BT=batch.starts_BT,
    deterministic=False,
    rngs={'dropout': dropout_key},
    mutable=[*collections, LOSSES],
  )

  def unembed(hidden_BTD: jax.Array) -> jax.Array:
    return model.apply({'params': params}, hidden_BTD, method='unembed')

  loss, nll_BT = losses.weighted_nll(unembed, hidden_BTD, batch.targets_BT, batch.weights_BT, row_ways)
  weight = batch.weights_BT.sum()
  inputs = LossInputs(params, batch, hidden_BTD, unembed, nll_BT, sown.get('intermediates', {}), hook_key)
  extra, metrics = hook(inputs)
  check_hook(extra, metrics)
  sown_loss = jnp.zeros(())
  for sown_BT in jax.tree.leaves(sown.get(LOSSES, {})):
    sown_loss += (sown_BT * batch.weights_BT).sum()
  return Terms(loss, extra, sown_loss, weight, metrics, nll_BT, hidden_BTD, carry, sown)


def each_micro_batch(accumulation_steps: int, batch: Any, carry: Any, key: jax.Array) -> list[tuple[Any, Any, jax.Array]]:
  """What the step goes through in turn, outside of it: each micro-batch with its carry and its key.

  Row r goes to micro-batch r % steps, so that each is spread over all devices.
  """

  def rows(i: int) -> Any:
    return jax.tree.map(lambda x: x[i::accumulation_steps], (batch, carry))

  return [(*rows(i), jax.random.fold_in(key, i)) for i in range(accumulation_steps)]


def means(sums: Sums) -> dict[str, float]:
  """The metrics of a step, on the host."""
  return {name: float(total) / max(float(weight), 1e-30) for name, (total, weight) in jax.device_get(sums).items()}


def make_train_step(
  model: base.LanguageModel,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  accumulation_steps: int,
  hook: LossHook = no_hook,
  spike_deviations: float = math.inf,
  average: optimizer.Average | None = None,
  row_ways: int = 1,
  product_dtype: str = 'float32',
) -> Callable[[state.TrainState, windows.Batch], tuple[state.TrainState, Sums]]:
  """The step, to be jitted with its state donated.

  A step whose loss or gradient isn't finite leaves parameters, moments, the schedule's count and the carry as they
  were, and so does one whose loss stands `spike_deviations` above the losses before; infinity lets all spikes through. With an `average`
  the state's `params` are that of its `trained` ones. Rows are split over `row_ways` devices.
  Kernels, and what is multiplied by them, are rounded to `product_dtype` first.
  """

  def loss_sum(params: Any, carry: Any, batch: windows.Batch, key: jax.Array) -> tuple[jax.Array, tuple[Any, Sums]]:
    terms = loss_terms(model, hook, params, carry, batch, key, row_ways=row_ways)
    objective = terms.objective
    return objective, (terms.carry, {**terms.metrics, 'loss': (terms.loss, terms.weight), 'objective': (objective, terms.weight)})

  grad_fn = jax.grad(loss_sum, has_aux=True)

  def summed_grads(params: Any, carry: Any, batch: windows.Batch, key: jax.Array) -> tuple[Any, Any, Sums]:
    if accumulation_steps == 1:
      grads, (carry, sums) = grad_fn(params, carry, batch, jax.random.fold_in(key, 0))
      return grads, carry, sums

    def split(x: jax.Array) -> jax.Array:
      # Row r goes to micro-batch r % steps, so that each is spread over all devices.
      return x.reshape(x.shape[0] // accumulation_steps, accumulation_steps, *x.shape[1:]).swapaxes(0, 1)

    def add(totals: Any, inputs: Any) -> tuple[Any, Any]:
      i, micro_batch, micro_carry = inputs
      grads, (micro_carry, sums) = grad_fn(params, micro_carry, micro_batch, jax.random.fold_in(key, i))
      return jax.tree.map(jnp.add, totals, (grads, sums)), micro_carry

    micro_batches, micro_carries = jax.tree.map(split, (batch, carry))
    inputs = (jnp.arange(accumulation_steps), micro_batches, micro_carries)
    first_batch, first_carry = jax.tree.map(lambda x: x[0], (micro_batches, micro_carries))
    shapes = jax.eval_shape(grad_fn, params, first_carry, first_batch, key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0], shapes[1][1]))
    (grads, sums), carries = jax.lax.scan(add, zeros, inputs)
    carry = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), carries)
    return grads, carry, sums

  def train_step(old: state.TrainState, batch: windows.Batch) -> tuple[state.TrainState, Sums]:
    with base.operands(product_dtype):
      return take(old, batch)

  def take(old: state.TrainState, batch: windows.Batch) -> tuple[state.TrainState, Sums]:
    key = jax.random.fold_in(old.root_key, old.step)
    grads, carry, sums = summed_grads(old.weights, old.carry, batch, key)
    objective, weight = sums.pop('objective')  # the loss and the hook's term
    mean_loss = sums['loss'][0] / jnp.maximum(weight, 1.0)
    grads = jax.tree.map(lambda g: g / jnp.maximum(weight, 1.0), grads)
    norm = optax.tree.norm(grads)  # finite gradients of 1e19 and above overflow it, and the step is bad then too
    updates, opt_state = tx.update(grads, old.opt_state, old.weights)
    weights = optax.apply_updates(old.weights, updates)
    params = weights if average is None else average(old.params, weights, opt_state, old.updates)
    trained = None if average is None else weights
    one = jnp.ones(())
    good = jnp.isfinite(objective) & jnp.isfinite(norm)
    spiked = good & health.is_spike(old.health, mean_loss, spike_deviations)
    applied = good & ~spiked
    params, trained, opt_state, carry = jax.tree.map(
      lambda new, previous: jnp.where(applied, new, previous),
      (params, trained, opt_state, carry),
      (old.params, old.trained, old.opt_state, old.carry),
    )
    new = dataclasses.replace(
      old,
      step=old.step + 1,
      updates=old.updates + applied,
      params=params,
      trained=trained,
      opt_state=opt_state,
      carry=carry,
      health=health.observe(old.health, mean_loss, counts=applied & (weight > 0), applied=applied, spiked=spiked),
    )
    fares = new.health
    counts = new.step - new.updates - fares.spiked_steps, fares.spiked_steps, fares.skipped_in_a_row
    sums |= {'grad_norm': (norm, one), 'learning_rate': (schedule(old.updates), one)}
    return new, sums | {name: (count.astype(jnp.float32), one) for name, count in zip(COUNTS, counts, strict=True)}

  return train_step


def make_dispatch(train_step: Callable[[state.TrainState, Any], tuple[state.TrainState, Sums]], most: int) -> Callable[..., Any]:
  """Up to `most` steps in one call, to be jitted with its state donated.

  Steps past `count` are computed and thrown away. So every dispatch, however short, is the same program, and a step is the same to the
  bit wherever dispatches are cut; and the loop's length is known, without which a GPU asks the host after each step whether to go on.

  Returns:
    A function of the state, `most` batches, stacked, and `count`, which gives the state after `count` steps and the sums of all, stacked.
  """

  def dispatch(old: state.TrainState, batches: windows.Batch, count: jax.Array) -> tuple[state.TrainState, Sums]:
    def one(before: state.TrainState, inputs: tuple[jax.Array, windows.Batch]) -> tuple[state.TrainState, Sums]:
      i, batch = inputs
      after, sums = train_step(before, batch)
      return jax.tree.map(lambda new, previous: jnp.where(i < count, new, previous), after, before), sums

    return jax.lax.scan(one, old, (jnp.arange(most), batches))

  return dispatch


def spans(first: int, stop: int, most: int, ends: Callable[[int], bool]) -> Iterator[range]:
  """The steps after step `first` up to `stop` by dispatches: at most `most` in each, and none after one that `ends` its dispatch."""
  while first < stop:
    full = min(first + most, stop)
    last = next((done for done in range(first + 1, full) if ends(done)), full)
    yield range(first + 1, last + 1)
    first = last


def each(sums: Sums, count: int) -> list[Sums]:
  """The sums of each of a dispatch's `count` steps. Those of one alone stay on the device: most are never read."""
  if not sums['loss'][0].shape:
    return [sums]
  on_host = jax.device_get(sums)
  return [jax.tree.map(lambda x, k=k: x[k], on_host) for k in range(count)]
