"""Tests over every paper, by discovery."""
