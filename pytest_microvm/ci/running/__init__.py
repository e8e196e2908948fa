"""A run of jobs: its plan is carried out, each task in a machine of its own."""
