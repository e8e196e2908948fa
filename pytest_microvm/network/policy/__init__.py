"""The network policy: rules, and how requests are matched against them. No connections are made here."""
