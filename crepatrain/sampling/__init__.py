"""A diffusers pipeline around an adapter, or around the transformer in training."""
