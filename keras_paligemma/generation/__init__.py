"""From logits to answers: one loop, how it chooses, and what it gives."""
