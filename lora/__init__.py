"""A Mistral language model in JAX whose 4-bit base stays frozen while LoRA adapters are trained and sampled from."""
