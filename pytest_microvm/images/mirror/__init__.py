"""Mirror a Python environment of this computer into machines, as one read-only layer at the same paths."""
