"""Replay of stored transitions: what may be drawn, with what probability, and how it is gathered."""
