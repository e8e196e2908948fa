"""This computer: what machines are started with, and what a project asks of it."""
