"""The same run in miniature on this machine, before a cluster is paid for it."""
