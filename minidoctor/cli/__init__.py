"""Command-line flags made from the configuration, the choice of device and dtype, and one-line errors."""
