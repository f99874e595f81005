"""Where videos come from: the toy world, a folder, an HTTP endpoint."""
