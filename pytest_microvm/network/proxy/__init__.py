"""A machine's proxy: it checks each request against the policy, adds credentials and connects."""
