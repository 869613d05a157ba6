"""From a beton and a subset to batches on the device."""
