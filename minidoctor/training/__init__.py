"""A training run around the step: data, log, saved state, memory estimate, report."""
