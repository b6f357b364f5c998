"""Floor 5: sentences made of stages."""
