"""The `edgeinfer` command, one file per command."""
