"""Checkpoints of open models and adapters, in Hugging Face's, PEFT's and this project's layouts."""
