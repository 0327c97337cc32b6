"""Experiments: one absl-flag module per job or claim; the docstring opens with its command and its expected numbers."""
