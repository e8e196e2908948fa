"""Safe handling of data from guests and strangers: text, secrets, archives, folders."""
