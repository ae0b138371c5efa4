"""What a prediction can promise, and how good it is: `pvl_adapter.trust.scores` (extra `trust`)."""
