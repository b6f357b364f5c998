"""Floor 1: the words and the arithmetic of the method. No torch; of files only YAML configurations are read."""
