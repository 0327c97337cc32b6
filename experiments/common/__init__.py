"""What every experiment shares: flags, the process, the directory of a run, plots."""
