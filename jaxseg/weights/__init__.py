"""Weights of other libraries: read from their files, named as ours."""
