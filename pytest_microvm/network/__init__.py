"""A machine's network access: rules, the policy proxy, credentials, and forwarded guest ports."""
