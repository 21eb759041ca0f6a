"""All that a run must keep to go on as if it had never stopped."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh

from textgen_jax import backend, sharding
from textgen_jax.models import base
from textgen_jax.training import health


@struct.dataclass
class TrainState:
  """Data only: model and optimizer are closed over by the step."""

  step: jax.Array  # batches consumed; always advances
  updates: jax.Array  # updates applied; `step` less the steps whose loss or gradient wasn't finite, or whose loss was a spike
  data_offset: jax.Array  # batches skipped on purpose: the next one is that of `step + data_offset`
  root_key: jax.Array  # uint32 key data; step keys are fold_in(root_key, step)
  health: health.Health
  params: Any  # what is scored and sampled from: the trained ones, or an average of them
  trained: Any  # what updates are applied to, where `params` are an average of it; else None
  opt_state: Any
  carry: Any  # the model's cache between contiguous batches; None with random windows

  @property
  def weights(self) -> Any:
    """The parameters whose gradient is taken."""
    return self.params if self.trained is None else self.trained


def _random_kernels() -> contextlib.AbstractContextManager[Any]:
  """Has JAX's kernel make the random bits of a program for a GPU, the same as XLA's own operations would.

  Those take half a second a parameter to compile: 41 s for GPT-2's smallest, compiled for an H100 on two cores, where the kernel's program
  takes 3.5. It can't be split over devices.
  """
  try:
    from jax._src.config import threefry_gpu_kernel_lowering  # JAX shows the setting, but not for one program
  except ImportError:
    return contextlib.nullcontext()
  return threefry_gpu_kernel_lowering(True)


def create(
  model: base.LanguageModel,
  tx: optax.GradientTransformation,
  seed: int,
  carry_rows: int,
  config: sharding.ShardingConfig,
  mesh: Mesh,
  averages: bool = False,
) -> tuple[Any, TrainState, TrainState]:
  """How to make a fresh state: shapes, then shardings, then the program that fills them.

  Args:
    model: the model.
    tx: the optimizer.
    seed: of the parameters and of all that training draws.
    carry_rows: rows of carry to keep (the batch size); 0 for none.
    config: rules of sharding.
    mesh: the mesh.
    averages: whether `params` are to be an average of the trained ones.

  Returns:
    A function without arguments that makes the state where it belongs; the state's
    shapes; its shardings.
  """

  # Traced once, for the names of its axes and within `init`; inlined, it is the program that it would be without.
  boxed_params = jax.jit(lambda key: base.init_params(model, key), inline=True)

  def init() -> TrainState:
    init_key, root_key = jax.random.split(jax.random.PRNGKey(seed))
    params = nn.unbox(boxed_params(init_key))
    carry = model.init_cache(carry_rows, 0) if carry_rows else None
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
      step=zero,
      updates=zero,
      data_offset=zero,
      root_key=root_key,
      health=health.fresh(),
      params=params,
      trained=params if averages else None,
      opt_state=tx.init(params),
      carry=carry,
    )

  abstract = jax.eval_shape(init)
  params = sharding.param_shardings(jax.eval_shape(boxed_params, abstract.root_key), config, mesh)
  everywhere: Any = sharding.replicated(mesh)
  shardings = TrainState(
    step=everywhere,
    updates=everywhere,
    data_offset=everywhere,
    root_key=everywhere,
    health=jax.tree.map(lambda _: everywhere, abstract.health),
    params=params,
    trained=params if averages else None,
    opt_state=sharding.optimizer_shardings(abstract.opt_state, abstract.params, params, mesh),
    carry=jax.tree.map(lambda _: sharding.batch_sharding(config, mesh), abstract.carry),
  )
  jitted = jax.jit(init, out_shardings=shardings)

  def fresh() -> TrainState:
    with _random_kernels() if mesh.size == 1 and backend.name() == 'gpu' else contextlib.nullcontext():
      return jitted()

  return fresh, abstract, shardings
