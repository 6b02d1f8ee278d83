"""What runs say, read from their files alone: results, verdict, table, figure, page, and the live view."""
