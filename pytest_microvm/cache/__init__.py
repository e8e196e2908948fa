"""The folder that holds images and templates, and the disk under it."""
