"""Run the jobs of a plan, each task in a machine of its own."""
