"""Answers with a number that takes long to read."""

print("9" * 1_000_000)
