"""One file per command: what is asked, in which order, what is said at the end."""
