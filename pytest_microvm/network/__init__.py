"""What a machine may reach: rules, the policy proxy, credentials, and the ports of the guest."""
