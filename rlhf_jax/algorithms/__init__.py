"""What an algorithm is made of: models, state, jitted functions and data, from arrays (a run) or from shapes (a plan)."""
