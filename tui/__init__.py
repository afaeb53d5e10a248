"""The terminal chat. Imports only the public names of edgeinfer."""
