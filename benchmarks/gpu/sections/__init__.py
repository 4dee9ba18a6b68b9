"""One file per section; its `cases(context)` returns the cases, most valuable first."""
