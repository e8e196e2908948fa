"""Answers with lists in lists in lists."""

print("[" * 100_000 + "]" * 100_000)
