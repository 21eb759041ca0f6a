"""How the processes of a run find each other: by flags, or by what a launcher has set."""

import contextlib
import dataclasses
import functools
import ipaddress
import os
import re
from typing import Any

# JAX tells nobody else whether a launcher that it knows has started the process.
from jax._src import clusters

from textgen_jax import errors

PORTS = (1, 65535)
# JAX's library holds 32 bits. Of a million processes its coordinator keeps 300 MB; of 2 ** 31, more than there is.
MOST = {'num_processes': 1_000_000, 'join_timeout_s': 1_000_000_000, 'hang_timeout_s': 1_000_000_000}


@dataclasses.dataclass(frozen=True)
class Place:
  """The coordinator's address, and who comes there."""

  coordinator: str
  num_processes: int
  process_id: int
  by_hand: bool  # told by flags, not by a launcher

  def told(self, field: str) -> str:
    """A field as the user knows it."""
    return f'{"--" if self.by_hand else "the launcher: "}{field}={getattr(self, field)}'

  def address(self) -> tuple[str, int]:
    host, _, port = self.coordinator.rpartition(':')
    return host.strip('[]'), int(port)


@dataclasses.dataclass(frozen=True)
class Launch:
  """How processes find each other; what isn't given is read from what SLURM, Kubernetes, Open MPI or Cloud TPU set.

  One process alone, where such a launcher tells of several, is `num_processes=1`.
  """

  coordinator: str | None = None  # HOST:PORT of process 0
  num_processes: int | None = None
  process_id: int | None = None
  join_timeout_s: int = 300  # for all processes to come
  hang_timeout_s: int = 900  # without a finished step, evaluation batch or save, once the first step is done

  def check(self) -> None:
    """Raises UserError where the flags don't go together."""
    given = {name: getattr(self, name) for name in ('coordinator', 'num_processes', 'process_id')}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given) and self.num_processes != 1:
      raise errors.UserError(f'--{missing[0]} is missing: --coordinator, --num_processes and --process_id go together')
    if self.coordinator is not None:
      check_address('--coordinator', self.coordinator)
    for name, most in MOST.items():
      if (value := getattr(self, name)) is not None and not 1 <= value <= most:
        raise errors.UserError(f'--{name}={value} is {"below 1" if value < 1 else f"above {most}"}')
    if self.process_id is not None and not 0 <= self.process_id < (self.num_processes or 0):
      raise errors.UserError(f'--process_id={self.process_id} is not in [0, --num_processes={self.num_processes})')

  @functools.cached_property
  def several(self) -> bool:
    """Whether this process is one of several: by the flags, or by a launcher's environment.

    Raises:
      UserError: there is such an environment, and it doesn't tell.
    """
    if self.num_processes is not None:
      return self.num_processes > 1
    try:
      return self._launcher is not None and self._launcher.get_process_count() > 1
    except (RuntimeError, ValueError, KeyError) as error:
      raise untold(error) from error

  @functools.cached_property
  def _launcher(self) -> Any:
    for cluster in clusters.ClusterEnv._cluster_types:
      # JAX warns of a pod that lacks a package, but only one of an indexed job is one of several.
      alone = cluster.__name__ == 'K8sCluster' and 'JOB_COMPLETION_INDEX' not in os.environ
      if not alone and not cluster.opt_in_only_method and cluster.is_env_present():
        return cluster
    return None

  def place(self) -> Place:
    """Where the processes meet, if they are several; a launcher may have to be waited for."""
    if self.coordinator is not None and self.num_processes is not None and self.process_id is not None:
      return Place(self.coordinator, self.num_processes, self.process_id, by_hand=True)
    port, known = os.environ.get('JAX_COORDINATOR_PORT'), os.environ.get('JAX_COORDINATOR_ADDRESS')  # which win, in JAX
    try:
      address = known or self._launcher.get_coordinator_address(timeout_secs=self.join_timeout_s, override_coordinator_port=port)
      found = Place(address, self._launcher.get_process_count(), self._launcher.get_process_id(), by_hand=False)
    except (ValueError, KeyError) as error:
      raise untold(error) from error
    check_address("the launcher's coordinator", found.coordinator)
    if not 0 <= found.process_id < found.num_processes <= MOST['num_processes']:
      raise untold(ValueError(f'process {found.process_id} of {found.num_processes}'))
    return found


def untold(error: Exception) -> errors.UserError:
  """What JAX raises of a launcher's variables, which it reads without a check."""
  why = f'{error} is not set' if isinstance(error, KeyError) else error
  told = f"the launcher's environment does not tell which process of how many this is, and where they meet ({why})"
  return errors.UserError(f'{told}: --num_processes=1 says that this one is alone')


def check_address(field: str, address: str) -> None:
  """Raises UserError where `address`, of the flag or variable `field`, can't be HOST:PORT: the library would wait for it, or crash."""
  host, _, port = address.rpartition(':')
  inner = host[1:-1] if host.startswith('[') and host.endswith(']') else None
  why = None
  if re.search(r'\s', address):
    why = 'HOST:PORT has no spaces'
  elif '://' in address:
    why = f'HOST:PORT has no scheme, {address.partition("://")[0]}://'
  elif inner is not None and not _is_ipv6(inner):
    why = f'{inner!r} in brackets is not an IPv6 address'
  elif inner is None and ':' in host:
    why = 'an IPv6 address is written in brackets, as in [::1]:8476'
  elif not re.fullmatch('[0-9]+', port) or not (inner or re.fullmatch('[A-Za-z0-9._-]+', host)):
    raise errors.UserError(f"{field}={address!r} isn't HOST:PORT")
  elif len(port) > 5 or not PORTS[0] <= int(port) <= PORTS[1]:
    why = f'the port is not in [{PORTS[0]}, {PORTS[1]}]'
  if why:
    raise errors.UserError(f'{field}={address!r}: {why}')


def _is_ipv6(text: str) -> bool:
  with contextlib.suppress(ValueError):
    return bool(ipaddress.IPv6Address(text))
  return False
