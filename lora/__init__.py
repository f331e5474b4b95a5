"""Language models in JAX: a frozen base, optionally 4-bit, with trainable LoRA adapters, and a sampling engine."""
