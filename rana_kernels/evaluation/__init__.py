"""Measurements of a compressed model from outside its modules: loss, live rows, and its worst predictions."""
