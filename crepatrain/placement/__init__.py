"""How a loaded module gets to its device, in which precision it computes there, and what its optimizer will hold beside it."""
