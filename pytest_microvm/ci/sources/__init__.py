"""Sources of a branch's files: git's objects, a work tree, an archive."""
