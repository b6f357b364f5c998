"""Floor 5: a model's folder and its memory: safe files, chat template, policy, loading."""
