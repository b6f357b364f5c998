"""Floor 9: the verbs of the loop. Stages never import each other; they meet in a run folder."""
