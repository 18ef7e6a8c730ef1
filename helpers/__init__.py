"""Many Hands: helpers for a course on training large models on many machines."""
