"""What makes a guest's or a stranger's bytes safe: text, secrets, archives, folders."""
