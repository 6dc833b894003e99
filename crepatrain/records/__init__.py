"""What a run leaves on disk: its folder, reading it back, event files and trackers."""
