"""Tests: real parts, and `models_for_tests` writes the models they run on."""
