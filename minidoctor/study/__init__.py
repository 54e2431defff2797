"""The ablation: variants of the training compared over seeds."""
