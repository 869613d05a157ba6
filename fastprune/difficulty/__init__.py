"""How hard each row is: one teacher pass over a beton, and the metrics made from it."""
