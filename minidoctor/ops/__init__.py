"""Faster or smaller forms of plain operations, each described by its plain form."""
