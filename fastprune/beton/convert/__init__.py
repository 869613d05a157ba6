"""Images to a beton: listings, preparation, and the file that is written."""
