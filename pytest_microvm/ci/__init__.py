"""Continuous integration: run each branch's jobs in their own machines, and merge their results."""
