"""Rhumbline's online half: the retrieval server. Imports neither torch nor the offline half."""

__version__ = "0.1.0"
