"""What changes weights: the learners, the reward model's training, what they share."""
