"""Frozen weights as integers and scales: storage, rounding, products."""
