"""Keys to bookmarks, and queries through them to the blocks worth reading."""
