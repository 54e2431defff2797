"""JSON and safetensors files: checked before they are read, renamed into place when they are written."""
