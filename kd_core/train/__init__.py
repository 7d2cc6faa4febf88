"""One readable training loop on accelerate, its schedules, data and checkpoints."""
