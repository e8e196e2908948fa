"""What a machine may reach: rules, and how requests are compared with them. No connection is made here."""
