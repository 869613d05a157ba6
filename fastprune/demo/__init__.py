"""The whole way on small images, with everything real."""
