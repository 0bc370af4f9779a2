"""Answers: finding the final one in a text, and whether two say the same."""
