"""What the GitHub Action decides."""
