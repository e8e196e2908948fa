"""The protocol between host and guest, without any I/O; both ends run the same code."""
