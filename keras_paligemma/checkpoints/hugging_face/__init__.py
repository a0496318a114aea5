"""Folders of transformers: configuration, tokenizer and table of weights."""
