"""Presets of KerasHub: configuration and table of weights."""
