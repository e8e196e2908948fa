"""What runs in a guest, as processes of this computer: the agent, and the runner with a backend for it."""
