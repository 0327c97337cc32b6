"""One step, two ways to map it over devices, and a loop that reads from top to bottom."""
