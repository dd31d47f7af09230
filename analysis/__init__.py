"""Saved runs to tables and figures: `python -m analysis figures|table SOURCE...`.

Reads files only. Needs no model, no GPU and no tracker, and knows nothing of how a run is made.
"""
