"""The programs of this computer that machines and image builds need."""
