"""A machine's proxy: judges each request, adds credentials, connects."""
