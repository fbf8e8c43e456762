"""Less compute for the same picture, and more compute for a better one: what each way buys."""
