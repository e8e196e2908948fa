"""Progress, raw mode and signals of the terminal that a command was started on."""
