"""A long text read once, piece by piece, into a cache; then one token at a time from it."""
