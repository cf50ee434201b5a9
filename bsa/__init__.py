"""Bookmark Sparse Attention: language models that route each query through bookmarks to the blocks worth reading."""
