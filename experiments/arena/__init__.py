"""Every method beside the exact optimum; `python -m experiments.arena --help`."""
