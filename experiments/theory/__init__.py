"""Claims about the tilt, confirmed, sharpened or refuted with a number: ``python -m experiments.theory``."""
