"""Betons in object storage: what is kept of them, fetched into sparse local files."""
