"""Prompts, and what answers mean: objects, boxes and masks, without Keras."""
