"""Boxes of JPEGs to pixels: headers, entropy decoding, IDCT, resize, color."""
