"""What XLA has compiled is kept on disk, so that the second start is faster."""

import os

import jax

from textgen_jax.data import downloads


def keep_compiled() -> None:
  """Turns JAX's persistent cache on, unless the user has set one."""
  if jax.config.values.get('jax_compilation_cache_dir') or 'JAX_COMPILATION_CACHE_DIR' in os.environ:
    return
  jax.config.update('jax_compilation_cache_dir', str(downloads.cache_directory() / 'xla'))
  # Small models' programs take under JAX's threshold of a second each, and there are a dozen of them.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
