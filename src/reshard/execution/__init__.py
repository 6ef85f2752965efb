"""Carries out a plan: reads or computes windows of the source, writes target files, resumes after interruptions."""
