"""Configurations: data only. `get_config(arg)` returns a ConfigDict."""
