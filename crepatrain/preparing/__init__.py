"""What happens before a run can begin: every clip is looked at, and the caches are filled."""
