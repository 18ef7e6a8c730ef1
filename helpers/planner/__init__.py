"""What a run will cost, before it runs; nothing here needs a cluster."""
