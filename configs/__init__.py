"""One file is one run."""
