"""One file for each library of others: FFCV, timm, Accelerate."""
