"""Measured claims: ratios between ways of doing the same work, side by side in one run."""
