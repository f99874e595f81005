"""Methods held against each other: many ordinary runs, and what they say together."""
