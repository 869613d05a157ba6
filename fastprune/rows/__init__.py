"""Files that the stages exchange: fingerprints, score tables and subsets, each written whole."""
