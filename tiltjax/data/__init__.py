"""Prompts, pairs and rankings from files; tokens; and `Candidates`, the one batch type."""
