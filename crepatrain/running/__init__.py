"""A run: its modules and state, the loop, evaluation and validation on the way."""
