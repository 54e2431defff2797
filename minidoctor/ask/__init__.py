"""Answers to questions: in a terminal, or to a file of questions."""
