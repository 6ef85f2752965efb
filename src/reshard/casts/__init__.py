"""Casts between BF16, FP8 with block scales and packed FP4 with block scales; rounding to BF16, and padding."""
