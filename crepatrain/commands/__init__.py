"""What each command does. `fit` calls its siblings; nobody else does."""
