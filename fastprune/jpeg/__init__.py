"""What we know of JPEG."""
