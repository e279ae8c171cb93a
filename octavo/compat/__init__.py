"""Stand-ins that let code written for other packages run on Octavo."""
