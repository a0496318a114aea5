"""Text and images in, the arrays of the model out.

Nothing is imported here: `images` and `inputs` need no KerasHub, and stay
importable without its TensorFlow.
"""
