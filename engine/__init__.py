"""The engine: scheduler, KV books, supervision, and the vocabulary the other processes share."""
