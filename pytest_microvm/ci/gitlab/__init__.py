"""GitLab's custom executor: its stages, and the machine that outlives them."""
