"""How much GPU memory a run takes: its own step on tensors without values, every storage accounted for."""
