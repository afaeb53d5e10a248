"""The `edgeinfer` command, one file per kind of command."""
