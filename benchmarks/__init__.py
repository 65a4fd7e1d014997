"""Timings, as ratios measured in one process; run them as modules."""
