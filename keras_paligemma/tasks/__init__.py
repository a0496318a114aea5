"""Prompts, and parsing of answers: objects, boxes and masks, without Keras."""
