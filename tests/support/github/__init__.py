"""GitHub Actions on this computer: the runner, its expressions, and the actions of others."""
