"""The E-step: rewards of reference candidates -> the tilted distribution, its normaliser, and how far to trust both."""
