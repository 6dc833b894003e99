"""The page in a browser: forms from the schema of a config, runs from their folders. It starts commands and does no work itself."""
