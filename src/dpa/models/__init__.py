"""Floor 3: everything that touches torch: chat templates, policies, samplers, scorers, training."""
