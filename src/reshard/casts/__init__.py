"""Conversions between dtypes: FP8 and FP4 with block scales, BF16."""
