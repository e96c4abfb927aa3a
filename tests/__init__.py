"""Tests; each names the authority it compares with."""
