"""Ways to keep keys and values between calls; each arrives at `attend()` with its positions."""
