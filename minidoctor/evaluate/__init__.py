"""Accuracy on multiple-choice and free-form questions."""
