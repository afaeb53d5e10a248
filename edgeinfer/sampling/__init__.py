"""How the next token is picked from logits."""
