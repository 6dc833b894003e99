"""How a loaded module gets to its device, and what its training keeps there."""
