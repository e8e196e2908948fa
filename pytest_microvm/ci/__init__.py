"""Branches become jobs, jobs run in machines of their own, and what they report becomes one result."""
