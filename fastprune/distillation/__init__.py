"""From batches and a teacher to a student."""
