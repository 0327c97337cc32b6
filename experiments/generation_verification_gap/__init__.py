"""Learning by verifying beside learning by imitation; `python -m experiments.generation_verification_gap --help`."""
