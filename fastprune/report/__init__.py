"""Pictures and tables of runs and of score tables."""
