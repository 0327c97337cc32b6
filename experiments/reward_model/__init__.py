"""Reward models of six kinds; `python -m experiments.reward_model --help`."""
