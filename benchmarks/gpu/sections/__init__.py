"""One file per section: `cases(context)` returns what is to be done, in the order of worth."""
