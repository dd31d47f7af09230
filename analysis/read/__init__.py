"""Readers: any saved form of a run becomes the same records."""
