"""Files that a kill leaves complete, and the state of a run that is resumed."""
