"""What training changes, and how: adapters, freezing, losses, optimizers."""
