"""A whole run: batches, the loop, when it stops, what it reports and where it writes."""
