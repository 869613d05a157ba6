"""One file for each outside library: Accelerate, FFCV, Hugging Face, timm, torchdistill."""
