"""Preprocessing of text and images to the arrays that the model takes.

Nothing is imported here, so that `images` and `inputs`, which do not need
KerasHub, can be imported without its TensorFlow.
"""
