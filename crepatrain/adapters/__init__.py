"""Adapter files: reading those of any program, checking them, writing those of a run."""
