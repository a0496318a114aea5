"""A server: requests of many clients, answered by one model in batches."""
