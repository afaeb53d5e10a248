"""Text to tokens and back: vocabularies, chat templates, replies."""
