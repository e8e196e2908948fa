"""JUnit as files: read from those nobody trusts, merged, checked, and shaped for who reads them."""
