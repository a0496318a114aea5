"""What answers mean: text to boxes and back, without Keras."""
