"""Loops over tokens or chunks of models, as operators that go on for any length."""
