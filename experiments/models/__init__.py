"""Flax models; nothing here knows about sparsity."""
