"""Runs: configuration, presets, the command line, and everything that watches a training."""
