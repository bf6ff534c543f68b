"""Subcommands of ``s2sent``, one per module: ``add`` declares its arguments to argparse, ``run`` executes it."""
