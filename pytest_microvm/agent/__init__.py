"""The host's end of the agent: its link, commands, files and paths in a machine."""
