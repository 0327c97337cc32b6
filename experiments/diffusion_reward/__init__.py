"""Every way to direct a diffusion to a reward; `python -m experiments.diffusion_reward --help`."""
