"""What XLA has compiled is kept on disk, so that the second start is faster."""

import os

import jax

from textgen_jax.data import downloads


def keep_compiled() -> None:
  """Turns JAX's persistent cache on, where the user has set it or else beside the prepared data."""
  if not jax.config.values['jax_compilation_cache_dir']:
    jax.config.update('jax_compilation_cache_dir', str(downloads.cache_directory() / 'xla'))
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    # Small models' programs take under JAX's threshold of a second each, and there are a dozen of them.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
