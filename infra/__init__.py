"""The local service stack: real servers as plain processes, no containers. Knows nothing of recipes, stages or flows."""
