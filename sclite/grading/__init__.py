"""Answers: extracting the final one from a text, and deciding whether two are equal."""
