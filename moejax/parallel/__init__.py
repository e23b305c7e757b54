"""Devices: the mesh, how parameters and rows lie on it, how rows move, and who computes what."""
