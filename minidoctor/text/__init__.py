"""Tokenizers and chat formats: text to token ids and back."""
