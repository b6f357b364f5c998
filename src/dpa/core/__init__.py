"""Floor 1: the words and the arithmetic of the method. No torch, no files."""
