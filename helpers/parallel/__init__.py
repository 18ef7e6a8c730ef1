"""The ways to train in parallel."""
