"""Guest images: kits, builds and the store."""
