"""Parameter golf in JAX: train, quantise and score a language model that fits in 16,000,000 bytes."""
