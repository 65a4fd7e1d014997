"""Sweeps: lists of jobs for experiments/sweep.py."""
