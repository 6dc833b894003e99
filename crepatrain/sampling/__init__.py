"""Videos from a diffusers pipeline: around trained weights beside their base, or around the transformer in training."""
