"""The format of transformers: configuration, tokenizer and weights."""
