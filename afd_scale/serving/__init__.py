"""A student behind HTTP: a page that shows what it makes while it is made, and the videos API of a teacher."""
