"""What the README and the documents claim, one claim a file."""
