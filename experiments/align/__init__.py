"""Tilt a language model towards a reward; `python -m experiments.align --help`."""
