"""The lowest floor: errors, files, headers, provenance, random streams, threads, progress."""
