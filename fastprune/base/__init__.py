"""What every station stands on: errors, files, checksums, random streams, ranks, progress."""
