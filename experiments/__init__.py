"""Training programs built on topkast_jax by its public names only."""
