"""Floor 11: whole runs made of stages: the loop, the methods it is compared with, what a run will take."""
