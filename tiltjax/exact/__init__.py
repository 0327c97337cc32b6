"""Worlds small enough to know everything: the truth that the estimates of the library are held to."""
