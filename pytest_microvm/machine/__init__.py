"""A running machine: the user's object for it, its quotas, its console, its saved records."""
