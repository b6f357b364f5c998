"""The phases of bench/card.py, a file for each subject."""
