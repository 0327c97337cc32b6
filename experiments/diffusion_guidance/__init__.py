"""Guidance beside the tilt it is named after; `python -m experiments.diffusion_guidance --help`."""
