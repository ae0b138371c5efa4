"""What a prediction can promise, and what its scores are."""
