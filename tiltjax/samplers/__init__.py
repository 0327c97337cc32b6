"""Draws from the tilt: selection among N candidates, resampling, and the decoding that makes the candidates."""
