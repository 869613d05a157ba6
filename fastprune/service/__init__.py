"""The loading service: one process decodes, and every trainer of the node takes views from it."""
