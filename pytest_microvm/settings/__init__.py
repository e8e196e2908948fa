"""User settings for machines: sizes and limits, project configuration, secrets, credentials, trust."""
