"""From files on disk to batches: what clips there are, how they are cut, what is cached of them, in which order they come."""
