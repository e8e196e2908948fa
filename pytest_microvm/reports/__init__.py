"""JUnit files: read untrusted ones, merge and check them, and write them for a given reader."""
