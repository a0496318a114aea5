"""A server that answers the requests of many clients in batches."""
