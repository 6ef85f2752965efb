"""Stages 1 and 2: reads a path into a checkpoint and finds the recipe rule of every tensor. Reads headers only."""
