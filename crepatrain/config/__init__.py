"""The config and what can be known of a run before torch is loaded. Nothing here imports torch."""
