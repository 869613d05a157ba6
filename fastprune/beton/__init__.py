"""Images in a beton: the format, reading, writing, checking."""
