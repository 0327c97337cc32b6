"""The peers, each a worker that runs in a virtual environment of its own (`setup.sh` makes them)."""
