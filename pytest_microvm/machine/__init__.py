"""A running machine: the object its user holds, its quotas, its console, what is kept of it."""
