"""A training step compiled for devices that are not there; `python -m experiments.plan --help`."""
