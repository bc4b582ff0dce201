"""Turns the records of a run into one self-contained HTML page."""
