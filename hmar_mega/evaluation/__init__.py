"""Sample quality and validation figures."""
