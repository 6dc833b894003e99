"""Sharing a run: what of it is uploaded, its model card, and the hub."""
