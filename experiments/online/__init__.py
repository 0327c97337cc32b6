"""Methods that learn in rounds, on two tasks; `python -m experiments.online --help`."""
