"""Canonical sharded checkpoints and export."""
