"""Templates: machines frozen on disk, extended link by link, and copied for every use."""
