"""What a model's speed and quality are, measured."""
