"""One training process: stock Megatron imported, its arguments, the device, the process groups."""
