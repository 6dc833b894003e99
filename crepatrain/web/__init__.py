"""The page in a browser: forms from a config's schema, runs from their folders. It starts commands, and trains nothing itself."""
