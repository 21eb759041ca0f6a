"""A plan as text and as JSON."""

from typing import Any

from textgen_jax import experiment as experiment_lib
from textgen_jax.planning import ahead, devices, estimate

GIB = 2**30
DAY_S = 86_400


def content(
  experiment: experiment_lib.Experiment,
  topology: devices.Topology,
  plan: estimate.Estimate,
  tokens: int,
  note: str,
) -> dict[str, Any]:
  """Everything that a plan says, as JSON values: bytes of one device, seconds, FLOPs.

  Args:
    experiment: resolved.
    topology: where it would be trained.
    plan: the estimate.
    tokens: to train on; 0: those of `training.num_steps`.
    note: on how the plan differs from the run.
  """
  tokens = tokens or experiment.training.num_steps * plan.tokens_per_step
  return {
    'topology': topology.name,
    'devices': topology.count,
    'mesh': plan.mesh,
    'parameters': plan.parameters,
    'non_embedding_parameters': plan.non_embedding,
    'vocabulary': plan.vocab,
    'kernel': plan.kernel,
    'flops_per_token': plan.flops_per_token,
    'tokens_per_step': plan.tokens_per_step,
    'flops_per_step': plan.flops_per_step,
    'bytes': {**vars(plan.footprint), 'peak': plan.footprint.peak, 'memory': topology.device.memory_bytes, 'cache_of_a_row': plan.cache},
    'collectives': [one._asdict() for one in plan.traffic],
    'time': plan.times and _times(topology, plan, tokens),
    'note': note or None,
  }


def compiled_content(plan: estimate.Estimate, compiled: ahead.Compiled) -> dict[str, Any]:
  """What the compiler says, beside the plan."""
  return {
    'peak_bytes': compiled.peak_bytes,
    'estimate_differs_by': plan.footprint.peak / compiled.peak_bytes - 1 if compiled.peak_bytes else None,
    'collectives': {kind: said._asdict() for kind, said in compiled.collectives.items()},
    'involuntary_rematerializations': compiled.rematerializations,
    'seconds': compiled.seconds,
  }


def _times(topology: devices.Topology, plan: estimate.Estimate, tokens: int) -> dict[str, float]:
  assert plan.times is not None
  step = plan.times.step
  peak = topology.count * (topology.device.flops or 0)
  return {
    **vars(plan.times),
    'step': step,
    'tokens_per_s': plan.tokens_per_step / step,
    'mfu': plan.flops_per_step / (step * peak),
    'tokens': tokens,
    'days': tokens / plan.tokens_per_step * step / DAY_S,
    'efficiency': estimate.EFFICIENCY,
  }


def text(told: dict[str, Any]) -> str:
  """`content` for people."""
  sizes, mesh = told['bytes'], ' x '.join(f'{axis} {size}' for axis, size in told['mesh'].items())
  lines = [
    f'{told["topology"]}: {told["devices"]} devices as {mesh}',
    f'parameters   {told["parameters"]:,}, {told["non_embedding_parameters"]:,} without tables of {told["vocabulary"]:,} ids',
    f'FLOPs        {told["flops_per_token"]:.3g} a token, {told["flops_per_step"]:.3g} a step of {told["tokens_per_step"]:,} tokens',
    'memory of a device, GiB (parameters, optimizer and carry exactly, the rest by estimate)',
  ]
  names = {'weights': 'weights as multiplied'}
  lines += [f'  {names.get(name, name):22}{_gib(size)}' for name, size in sizes.items() if name not in ('peak', 'memory', 'cache_of_a_row')]
  lines += [
    f'  {"peak":22}{_gib(sizes["peak"])} of {_gib(sizes["memory"]).strip() if sizes["memory"] else "unknown"}'
    + f', kernel {told["kernel"]}',
    f'  {"cache, a row":22}{_gib(sizes["cache_of_a_row"])}, in generation',
  ]
  if told['collectives']:
    lines.append('collectives a device and step')
    for one in told['collectives']:
      seconds = '' if one['seconds'] is None else f', {_ms(one["seconds"])}' + (', waited for' if one['waits'] else '')
      lines.append(f'  {one["kind"]:15} over {one["over"]:15} {_gib(one["bytes"])} GiB{seconds}')
  if told['time']:
    lines += _time_lines(told['time'])
  if told['note']:
    lines.append(f'note         {told["note"]}')
  return '\n'.join(lines)


def _time_lines(time: dict[str, float]) -> list[str]:
  names = {'products': 'products', 'recurrence': 'recurrence', 'hidden': 'told beside them', 'waited': 'waited for', 'update': 'update'}
  parts = ', '.join(f'{told} {_ms(time[name])}' for name, told in names.items() if time[name])
  return [
    f'a step       {_ms(time["step"])} ({parts}; products at {time["efficiency"]:.0%} of the peak)',
    f'speed        {time["tokens_per_s"]:,.0f} tokens/s, MFU {time["mfu"]:.1%}',
    f'training     {time["tokens"]:.4g} tokens in {time["days"]:.3g} days',
  ]


def compiled_text(compiled: dict[str, Any]) -> str:
  """`compiled_content` for people."""
  differs = compiled['estimate_differs_by']
  beside = '' if differs is None else f'; the estimate is {abs(differs):.0%} {"above" if differs > 0 else "below"}'
  lines = [f'compiled     in {compiled["seconds"]:.0f} s, peak {_gib(compiled["peak_bytes"]).strip()} GiB{beside}']
  for kind, said in compiled['collectives'].items():
    lines.append(f'  {kind:20} {said["times"]:6} times {_gib(said["bytes"])} GiB')
  if count := compiled['involuntary_rematerializations']:
    lines.append(f'  XLA warns {count} times of involuntary full rematerialization: an array is copied whole to be split otherwise')
  return '\n'.join(lines)


def _gib(size: float) -> str:
  return f'{size / GIB:9.3f}'


def _ms(seconds: float) -> str:
  return f'{1e3 * seconds:.3g} ms' if seconds < 1 else f'{seconds:.3g} s'
