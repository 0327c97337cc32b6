"""The M-step and its rivals: arrays in, one value per prompt out. One file is one family; no loss averages."""
