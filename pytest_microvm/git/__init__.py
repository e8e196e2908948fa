"""Runs git on this computer's repositories so that nothing in them acts."""
