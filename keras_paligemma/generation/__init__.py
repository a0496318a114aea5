"""Decoding: one loop, the choice of tokens, and the answers it returns."""
