"""The state-tracking study: tasks in which recurrence must matter, and who can do them."""
