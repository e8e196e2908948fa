"""What users say about machines: sizes and limits, project configuration, secrets, credentials, trust."""
