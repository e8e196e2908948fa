"""Code that runs inside a guest: the agent (PID 1) and the pytest runner. Standard library only."""
