"""Devices, memory, data types and tensors. No mathematics lives here."""
