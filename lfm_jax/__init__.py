"""Pre-training, alignment and export of hybrid language models in JAX."""
