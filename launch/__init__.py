"""What to run and where: the command line and the recipes."""
