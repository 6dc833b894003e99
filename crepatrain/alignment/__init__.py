"""CREPA and its kin: what a frame's hidden states are compared with, how, and how strongly. Knows no DiT family and no config."""
