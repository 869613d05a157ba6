"""From scores to the rows that are kept."""
