"""GitLab's custom executor: its stages, and the machine that all stages of a job share."""
