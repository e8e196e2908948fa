"""Where the files of a branch come from: git's objects, a work tree, an archive."""
