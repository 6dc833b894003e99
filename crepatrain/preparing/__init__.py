"""What happens before a run can begin: every clip is read, and the caches are filled."""
