"""The channel between host and guest, without any I/O: the same code on both ends."""
