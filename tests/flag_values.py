"""What the sweep of flags gives to flags that do not take just any value."""

VALUES: dict[str, str] = {}
"""Flag -> the value that is tried, where a rule from its type does not fit."""

NEEDS: dict[str, str] = {}
"""Flag -> flags that it acts with; the run is compared with one that has these alone."""

NO_EFFECT: dict[str, str] = {}
"""Flag -> why a run on one rank of a host shows no difference."""
