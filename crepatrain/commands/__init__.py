"""What each command does. The stages of a run call each other in one direction: preflight, precompute, session, fit."""
