"""A server under load, floods, kills and nonsense."""
