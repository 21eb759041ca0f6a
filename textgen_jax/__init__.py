"""Trains causal language models on text in JAX and samples from them."""
