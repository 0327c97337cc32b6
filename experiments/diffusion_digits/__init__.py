"""A denoiser of digits and its tilts; `python -m experiments.diffusion_digits --help`."""
