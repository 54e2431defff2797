"""Faster or smaller forms of plain operations, each next to its plain form."""
