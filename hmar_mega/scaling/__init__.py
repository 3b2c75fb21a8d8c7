"""Scaling-law sweeps."""
