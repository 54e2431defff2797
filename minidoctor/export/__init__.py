"""Plain LoRA adapters for other programs: PEFT's layout, or a merged checkpoint."""
