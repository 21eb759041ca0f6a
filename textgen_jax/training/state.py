"""All that a run must keep to go on as if it had never stopped."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

# JAX shows the setting, but not for one program.
from jax._src import config as config_states
from jax.sharding import Mesh

from textgen_jax import sharding
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
    # A GPU's program of random numbers by XLA's own operations takes half a second a parameter to compile: 41 s for GPT-2's smallest,
    # where these kernels take 4, on two cores. The numbers are the same. XLA can't split them over devices.
    with config_states.threefry_gpu_kernel_lowering(mesh.size == 1):
      return jitted()

  return fresh, abstract, shardings
